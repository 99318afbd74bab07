"""Central training: equal to one client, folds that do not leak, kills, seeds, single sites."""

from checks import InputError

import argparse
import csv
import json

import numpy as np
import pytest
from helpers import ROOT, SMALL, equal, history, kill, same_run, script, toy_images, train

import compare
import fedavg
import models
import train_central
from dataset import parts
from reporting import metrics, run_folder
from training import evaluation

pytestmark = pytest.mark.usefixtures("undrawn")  # but for folds_run, in a process of its own
FOLDS = ["--folds", "3", "--epochs", "2", "--optimizer", "sgd", "--plateau", "1"]


def central(tree, out, *arguments):
    train_central.main(["--data", str(tree), *SMALL, "--out", str(out), *map(str, arguments)])
    return out


def alone(run, out):
    train_central.main(["--like", str(run), "--local-only", "--out", str(out)])
    return out


def last(folder):
    return models.read_file(folder / "last.pt")["state"]


def load(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def folds_run(tree, tmp_path_factory):
    """Uninterrupted, as its own process."""
    out = tmp_path_factory.mktemp("central") / "folds"
    done = script("--data", tree, *SMALL, *FOLDS, "--out", out, name="train_central.py")
    assert done.returncode == 0, done.stderr
    return out, done


# ---- the same algorithm -------------------------------------------------------------------------

def test_one_client_and_one_round_are_central_training_bit_for_bit(tree, tmp_path):
    train(tree, tmp_path / "fed", "--clients", 1, "--rounds", 1, "--local-epochs", 3)
    train_central.main(["--like", str(tmp_path / "fed"), "--out", str(tmp_path / "central")])
    assert equal(last(tmp_path / "fed"), last(tmp_path / "central"))
    fed, own = history(tmp_path / "fed"), history(tmp_path / "central")
    assert [r["epoch"] for r in own] == [1, 2, 3]
    assert own[2]["val_loss"] == fed[0]["val_loss"]
    assert [r["val_loss"] for r in own[:2]] == [None, None]
    assert sum(r["images"] for r in own) == fed[0]["images"]
    a, b = load(tmp_path / "fed"), load(tmp_path / "central")
    assert a["last"]["test"] == b["last"]["test"] and a["images_seen"] == b["images_seen"]
    assert a["optimizer_steps"] == b["optimizer_steps"] and a["colour_only"] == b["colour_only"]


def test_single_sites_are_central_training_on_what_they_own(tree, tmp_path):
    """One client alone is the centre; several train for rounds x local epochs on their own part."""
    train(tree, tmp_path / "fed", "--clients", 1, "--rounds", 1, "--local-epochs", 2)
    alone(tmp_path / "fed", tmp_path / "one")
    assert equal(last(tmp_path / "one" / "client0"), last(tmp_path / "fed"))
    three = train(tree, tmp_path / "three", "--clients", 3, "--rounds", 2, "--partition",
                  "dirichlet", "--alpha", 1, "--bn", "local", "--fraction", 0.5)
    out = alone(three, tmp_path / "sites")
    assert (out / "split.csv").read_bytes() == (three / "split.csv").read_bytes()
    rows = list(csv.DictReader((out / "split.csv").open()))
    tests = [r["path"] for r in rows if r["split"] == "test"]
    results = load(out)
    for k in range(3):
        site = out / f"client{k}"
        mine = [r["path"] for r in rows if r["client"] == str(k)]
        own = list(csv.DictReader((site / "split.csv").open()))
        assert [r["path"] for r in own if r["split"] == "train"] == mine
        assert [r["path"] for r in own if r["split"] == "test"] == tests
        assert [r["images"] for r in history(site)] == [len(mine) - (len(mine) % 8 == 1)] * 2
        assert results["members"][k]["train"] == len(mine)
        assert results["members"][k]["accuracy"] == load(site)["best"]["test"]["accuracy"]
    assert "best" not in results and not (out / "predictions.csv").exists()
    assert len({json.dumps(history(out / f"client{k}")) for k in range(3)}) == 3
    values = [m["accuracy"]["value"] for m in results["members"]]
    assert results["mean"]["accuracy"] == {"n": 3, "mean": pytest.approx(np.mean(values)),
                                           "sd": pytest.approx(np.std(values, ddof=1))}


def test_like_copies_split_network_seed_recipe_and_budget(tree, tmp_path):
    fed = train(tree, tmp_path / "fed", "--rounds", 2, "--local-epochs", 2, "--seed", 3,
                "--split", "grouped", "--optimizer", "adam", "--bn", "freeze", "--augment", "none",
                "--plateau", 0)
    train_central.main(["--like", str(fed), "--out", str(tmp_path / "central")])
    one, two = (json.loads((f / "run.json").read_text())["arguments"]
                for f in (fed, tmp_path / "central"))
    assert {k for k in one if k in two and one[k] != two[k]} == set()
    assert {"seed", "split", "split_seed", "model", "lr", "optimizer", "augment", "bn",
            "batch_size", "image_size", "data", "weights"} <= set(one) & set(two)
    assert (two["epochs"], two["period"], two["folds"], two["bn"]) == (4, 2, 1, "freeze")
    lines = history(tmp_path / "central")
    assert [r["val_loss"] is None for r in lines] == [True, False, True, False]
    parts = [[(r["path"], r["split"]) for r in csv.DictReader((f / "split.csv").open())]
             for f in (fed, tmp_path / "central")]
    assert parts[0] == parts[1]
    changed = (fed / "split.csv").read_text().replace(",val,", ",test,", 1)
    (fed / "split.csv").write_text(changed)
    with pytest.raises(InputError, match="do not give its split"):
        train_central.main(["--like", str(fed), "--out", str(tmp_path / "other")])
    fed.rename(tmp_path / "away")
    (tmp_path / "central" / "report.md").unlink()
    train_central.main(["--resume", str(tmp_path / "central")])  # needs the other run no more
    assert (tmp_path / "central" / "report.md").exists()
    short = central(tree, tmp_path / "short", "--folds", 1, "--epochs", 2, "--period", 3)
    assert [r["val_loss"] is None for r in history(short)] == [True, False]


@pytest.mark.parametrize("folds", [1, 2])
def test_the_only_hospital_alone_is_no_cross_validation(tree, tmp_path, folds):
    fed = train(tree, tmp_path / "fed", "--clients", 1, "--rounds", 1, "--folds", folds)
    out = alone(fed, tmp_path / "alone")
    assert "best" not in load(out) and [m["name"] for m in load(out)["members"]] == ["client0"]
    assert [run.site for run in compare.load(out)] == ["client0"]


def test_the_schedule_steps_at_validations(tree, tmp_path, monkeypatch, capsys):
    losses, bars, bar = iter([3.0, 4.0, 4.0, 4.0, 4.0]), [], train_central.tqdm
    monkeypatch.setattr(train_central, "tqdm", lambda **more: bars.append(more) or bar(**more))
    monkeypatch.setattr(evaluation.Evaluation, "tally", lambda *a: [7, 0, 7 * next(losses)])
    out = central(tree, tmp_path / "run", "--folds", 1, "--epochs", 20, "--period", 2, "--lr", 0.5,
                  "--plateau", 1, "--early-stop", 4)
    lines = history(out)
    # worse at epochs 4 and 6: cut from epoch 7 on; again worse at 8 and 10: stop after the fourth
    assert [r["lr"] for r in lines] == [0.5] * 6 + [0.1] * 4
    assert [r["epoch"] for r in lines if r["val_loss"] is not None] == [2, 4, 6, 8, 10]
    assert models.read_file(out / "model.pt")["epoch"] == 2
    assert [(b["total"], b["desc"]) for b in bars] == [(58, f"epoch {k}/20") for k in range(1, 11)]
    said = capsys.readouterr().out
    assert "early stop: no better validation loss for 4 validations" in said
    assert "----" not in said  # one split is no part of anything


# ---- k-fold -------------------------------------------------------------------------------------

def test_folds_are_pooled_and_reported(folds_run, tree):
    out, done = folds_run
    assert {p.name for p in out.iterdir()} == {
        "fold1", "fold2", "fold3", "run.json", "split.csv", "predictions.csv", "results.json",
        "report.md", "curves.png", "confusion.png"}
    results, parts = load(out), [load(out / f"fold{k}") for k in (1, 2, 3)]
    rows = {r["path"]: r for r in csv.DictReader((out / "predictions.csv").open())}
    assert len(rows) == 72 == results["best"]["test"]["n"]
    for k, part in enumerate(parts, 1):
        tested = [r for r in csv.DictReader((out / f"fold{k}" / "predictions.csv").open())
                  if r["split"] == "test"]
        for r in tested:
            assert rows[r["path"]]["split"] == f"fold{k}"
            assert rows[r["path"]]["prediction"] == r["prediction"]
            assert float(rows[r["path"]]["p_Pre"]) == pytest.approx(float(r["p_Pre"]), abs=1e-6)
        assert len(tested) == part["best"]["test"]["n"] == results["members"][k - 1]["n"]
    pooled = np.sum([p["best"]["test"]["confusion"] for p in parts], 0)
    assert results["best"]["test"]["confusion"] == pooled.tolist()
    assert results["best"]["test"]["accuracy"] == metrics.wilson(int(np.trace(pooled)), 72)
    assert results["best"]["test"]["loss"] == pytest.approx(np.average(
        [p["best"]["test"]["loss"] for p in parts],
        weights=[p["best"]["test"]["n"] for p in parts]), abs=1e-5)
    assert results["best"]["test"]["roc_auc"] == results["mean"]["roc_auc"]["mean"]
    assert results["best"]["test"]["intervals"]["roc_auc"] == {"low": None, "high": None}
    assert results["best"]["test"]["per_class"]["Pre"]["auc"] == pytest.approx(np.mean(
        [p["best"]["test"]["per_class"]["Pre"]["auc"] for p in parts]))
    for key in ("accuracy", "macro_f1", "roc_auc"):
        values = [p["best"]["test"][key] for p in parts]
        values = [v["value"] if isinstance(v, dict) else v for v in values]
        assert results["mean"][key] == {"n": 3, "mean": pytest.approx(np.mean(values)),
                                        "sd": pytest.approx(np.std(values, ddof=1))}
    for i, row in enumerate(results["colour_only"]):
        hits = sum(round(p["colour_only"][i]["test"]["value"] * p["best"]["test"]["n"])
                   for p in parts)
        assert row["test"] == metrics.wilson(hits, 72)
    assert results["images_seen"] == sum(p["images_seen"] for p in parts)
    assert {r["split"] for r in csv.DictReader((out / "split.csv").open())} == {
        "fold1", "fold2", "fold3"}
    report = (out / "report.md").read_text()
    assert "pooled, out of fold" in report and "curves.png" in report and "Model card" in report
    assert "mean ± sd of 3" in done.stdout


def test_every_fold_starts_alike_and_has_its_own_split(folds_run):
    out, _ = folds_run
    first = [history(out / f"fold{k}")[0] for k in (1, 2, 3)]
    assert len({r["train_loss"] for r in first}) == 3
    parts = [(out / f"fold{k}" / "split.csv").read_text() for k in (1, 2, 3)]
    assert len(set(parts)) == 3


def test_the_last_fold_does_not_depend_on_those_before(folds_run, tree, tmp_path):
    """Folds are runs of their own: trained alone, the third gives the same bytes."""
    out, _ = folds_run
    args = run_folder.parse("x", train_central.GROUPS, train_central.defaults,
                            ["--data", str(tree), *SMALL, *FOLDS])
    run, _, _ = train_central.prepare(args)
    (tmp_path / "fold3").mkdir()
    (tmp_path / "fold3" / "run.json").write_text((out / "fold3" / "run.json").read_text())
    train_central.train_alone(args, tmp_path / "fold3", run, run.several["fold3"],
                              models.moved(run.model.state_dict(), "cpu"))
    assert same_run(out / "fold3", tmp_path / "fold3")


def test_inner_val_0_trains_a_fixed_time_and_scores_the_last_epoch(tree, tmp_path):
    out = central(tree, tmp_path / "run", "--folds", 2, "--epochs", 3, "--inner-val", 0,
                  "--plateau", 1, "--early-stop", 1)
    for k in (1, 2):
        lines, results = history(out / f"fold{k}"), load(out / f"fold{k}")
        assert len(lines) == 3 and {r["val_loss"] for r in lines} == {None}
        assert {r["lr"] for r in lines} == {0.01}
        assert results["best"] == results["last"] and results["best"]["epoch"] == 3
        assert results["best"]["val"] is None
        assert "No validation part: the last epoch is scored" in \
            (out / f"fold{k}" / "report.md").read_text()
        parts = [r["split"] for r in csv.DictReader((out / f"fold{k}" / "split.csv").open())]
        assert sorted(set(parts)) == ["test", "train"]


def test_a_folds_test_part_is_touched_after_its_training_only(tree, tmp_path, monkeypatch):
    folds = []  # of each: its split, its steps, and its looks as (steps so far, images)
    predict, step = evaluation.predict, fedavg.train_step
    train_alone = train_central.train_alone

    def noted(args, folder, run, split, *rest):
        folds.append({"split": split, "steps": 0, "looks": []})
        return train_alone(args, folder, run, split, *rest)

    def counted(model, images, indices):
        folds[-1]["looks"].append((folds[-1]["steps"], set(indices.tolist())))
        return predict(model, images, indices)

    def stepped(*args, **kwargs):
        folds[-1]["steps"] += 1
        return step(*args, **kwargs)
    monkeypatch.setattr(evaluation, "predict", counted)
    monkeypatch.setattr(fedavg, "train_step", stepped)
    monkeypatch.setattr(train_central, "train_alone", noted)
    central(tree, tmp_path / "run", *FOLDS)
    assert len(folds) == 3
    for fold in folds:
        val, test = (set(fold["split"][part].tolist()) for part in ("val", "test"))
        looks = [when for when, images in fold["looks"] if images & test]
        assert looks and set(looks) == {fold["steps"]}
        assert all(images in (val, test) for _, images in fold["looks"])


# ---- kills --------------------------------------------------------------------------------------

@pytest.mark.parametrize("point,count", [
    ("train_step", 1),       # before the first checkpoint
    ("half-written", 1),     # the starting state, half written
    ("half-written", 3),     # last.pt of the first epoch, half written
    ("append_history", 3),   # in the second fold
    ("replace", 22),         # somewhere at the end of a fold
    ("write_predictions", 4)])  # of the pooled folds
def test_killed_and_resumed_equals_never_killed(folds_run, tree, tmp_path, point, count):
    out = tmp_path / "killed"
    kill(point, count, "train_central", "--data", tree, *SMALL, *FOLDS, "--out", out)
    assert not (out / "results.json").exists()
    train_central.main(["--resume", str(out)])
    for k in (1, 2, 3):
        assert same_run(folds_run[0] / f"fold{k}", out / f"fold{k}")
    for name in ("predictions.csv", "split.csv"):
        assert (folds_run[0] / name).read_bytes() == (out / name).read_bytes()
    one, two = load(folds_run[0]), load(out)
    assert one.pop("seconds") != two.pop("seconds") and one == two


def test_a_kill_loses_at_most_the_current_epoch(tree, tmp_path, monkeypatch):
    out = tmp_path / "run"
    kill("append_history", 3, "train_central", "--data", tree, *SMALL, "--folds", 1, "--epochs", 3,
         "--period", 3, "--out", out)
    trained = []
    original = fedavg.train_local

    def counted(*args):
        trained.extend(args[6])
        return original(*args)
    monkeypatch.setattr(fedavg, "train_local", counted)
    train_central.main(["--resume", str(out)])
    assert trained == [2]
    assert same_run(out, central(tree, tmp_path / "whole", "--folds", 1, "--epochs", 3,
                                 "--period", 3))


def test_defaults_are_the_papers_and_the_demonstrations():
    def parse(*argv):
        return run_folder.parse("x", train_central.GROUPS, train_central.defaults, list(argv))
    paper = parse("--data", "x")
    assert (paper.model, paper.folds, paper.epochs, paper.split, paper.inner_val, paper.lr,
            paper.plateau, paper.early_stop, paper.period, paper.bn) == (
        "resnet50", 5, 40, None, 0.1, 1e-4, 5, 10, 1, "train")
    for flags, split in ([], "stratified"), (["--folds", "1"], "random"), (
            ["--split", "blocked"], "blocked"):
        given = parse("--data", "x", *flags)
        parts.settle(given, toy_images(20))  # what is not given follows from the images
        assert given.split == split
    small = parse()
    assert (small.epochs, small.model, small.weights, small.folds, small.early_stop) == (
        20, "resnet18", "none", 5, 5)
    least = parse("--epochs", "1", "--period", "1")
    assert (least.epochs, least.period) == (1, 1)


def test_lost_weights_stop_the_run_with_the_last_good_state(tree, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        central(tree, tmp_path / "run", "--folds", 1, "--epochs", 2, "--optimizer", "sgd", "--lr",
                "1e38", "--clip", "0")
    assert stop.value.code == 1 and "the weights are not finite" in capsys.readouterr().err
    last = models.read_file(tmp_path / "run" / "last.pt")
    assert last["epoch"] == 0 and all(v.isfinite().all() for v in last["state"].values())


def test_help_names_every_group():
    done = script("--help", name="train_central.py", cwd=ROOT)
    assert done.returncode == 0
    for group in ("data", "split", "model", "centralised training", "local training", "run folder"):
        assert f"\n{group}:" in done.stdout


def test_a_run_made_before_folds_is_like_one_split(monkeypatch):
    recorded = {"rounds": 3, "local_epochs": 2, "bn": "average", "seed": 5, "clients": 4,
                "fraction": 1.0}
    monkeypatch.setattr(run_folder, "read_run", lambda folder: {"arguments": recorded})
    args = argparse.Namespace(like="old", seed=0, folds=5, epochs=40, bn="train", period=1,
                              resume=None, local_only=False)
    assert train_central.defaults(args) == {"folds": 1, "seed": 5, "bn": "train", "epochs": 6,
                                            "period": 2}
    recorded["fraction"] = 0.3  # one of four in each round: a quarter of the images passed
    assert train_central.defaults(args)["epochs"] == 2  # of 1.5
    recorded |= {"fraction": 0.5, "rounds": 10}
    assert train_central.defaults(args)["epochs"] == 10
    args.local_only = True  # a hospital alone trains in every round
    assert train_central.defaults(args)["epochs"] == 20
    args.local_only = False
    recorded |= {"fraction": 0.1, "rounds": 1, "local_epochs": 1}
    assert train_central.defaults(args)["epochs"] == 1
    recorded |= {"fraction": 1.0, "rounds": 3, "local_epochs": 2}
    monkeypatch.setattr(train_central.experiment, "prepare", lambda *a: 1 / 0)
    for args.folds, raised in ((1, ZeroDivisionError), (2, InputError), (5, InputError)):
        with pytest.raises(raised, match="zero" if args.folds == 1 else "--folds is 1 there"):
            train_central.prepare(args)


def test_only_flags_that_differ_and_are_not_derived_are_said(capsys):
    recorded = {"lr": 0.1, "weight_decay": 0.5, "seed": 3, "rounds": 5, "epochs": 9, "data": "x",
                "bn": "local"}
    train_central.say_differences(argparse.Namespace(
        like="run", lr=0.2, weight_decay=0.0, seed=3, epochs=4, data="y", bn="train",
        batch_size=8), recorded)
    assert capsys.readouterr().err == ("note: --lr is 0.2, and 0.1 in run\n"
                                       "note: --weight-decay is 0.0, and 0.5 in run\n")


def test_central_training_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process, not under torchrun"):
        train_central.prepare(argparse.Namespace())


def test_a_line_of_an_epoch_by_hand():
    training = {"train_loss": 0.7, "train_accuracy": 0.5, "images": 58, "steps": 8,
                "skipped_steps": 1}
    when = {"epoch": 3, "lr": 0.1}
    assert evaluation.make_record(when, [8, 6, 4.0], training, 2.0) == {
        "epoch": 3, "lr": 0.1, "val_loss": 0.5, "val_accuracy": 0.75, "train_loss": 0.7,
        "train_accuracy": 0.5, "images": 58, "steps": 8, "skipped_steps": 1, "seconds": 2.0,
        "images_per_second": 29}
    unseen = evaluation.make_record(when, [0, 0, 0.0], training, 2.0)
    assert unseen["val_loss"] is unseen["val_accuracy"] is None
