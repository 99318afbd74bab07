"""The real script on real files: what it writes, that it repeats, resumes and survives kills."""

import argparse
import csv
import json
import os

import numpy as np
import pytest
import torch
from helpers import BASE, BNNet, Process, clone, history, kill, same_run, script, toy_images, train

import data
import fedavg
import models
import train_federated
from dataset import parts
from reporting import metrics, run_folder
from training import evaluation

pytestmark = pytest.mark.usefixtures("undrawn")  # but for hard_run, in a process of its own
# momentum, partial participation, non-IID: whatever a resume could get wrong
HARD = ["--optimizer", "sgd", "--fraction", "0.5", "--partition", "dirichlet", "--plateau", "1"]


@pytest.fixture(scope="session")
def hard_run(tree, tmp_path_factory):
    """Uninterrupted, as its own process: what every killed run must end up as."""
    out = tmp_path_factory.mktemp("runs") / "hard"
    done = script("--data", tree, *BASE, *HARD, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_smoke_the_run_folder_holds_what_the_design_lists(hard_run, tree):
    out, done = hard_run
    assert {p.name for p in out.iterdir()} == {
        "run.json", "split.csv", "history.jsonl", "last.pt", "model.pt", "predictions.csv",
        "results.json", "report.md", "history.png", "confusion.png", "roc.png", "clients.png"}
    assert len([x for x in done.stdout.splitlines() if x.startswith("round ")]) == 3
    assert len([x for x in done.stdout.splitlines() if x.startswith("  client ")]) == 6
    assert "with a twin in training: 0 of 7 validation, 0 of 7 test" in done.stdout
    run = json.loads((out / "run.json").read_text())
    assert run["argv"][:2] == ["--data", str(tree)] and run["arguments"]["rounds"] == 3
    assert run["seed"] == 0 and not run["synthetic"]
    assert run["classes"] == ["Benign", "Early", "Pre"] and len(run["fingerprint"]) == 64
    assert run["machine"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["machine"]["amp_auto"] == str(models.pick_precision("auto", torch.device("cpu")))
    precision = run["machine"]["amp_auto"]
    assert f"; toynet on cpu, {'float32' if precision == 'None' else 'autocast ' + precision}\n" \
        in done.stdout
    for record in map(json.loads, (out / "history.jsonl").read_text().splitlines()):
        assert record["images_per_second"] == record["images"] / record["seconds"]
    rows = list(csv.DictReader((out / "split.csv").open()))
    assert [sum(r["split"] == p for r in rows) for p in ("train", "val", "test")] == [58, 7, 7]
    assert all((r["client"] != "") == (r["split"] == "train") for r in rows)
    report = (out / "report.md").read_text()
    assert "Model card" in report and "Not a medical device" in report and "roc.png" in report
    assert "SYNTHETIC" not in report
    assert "| seed | 0 |" in report and "| mu | 0.0 |" in report and "skip_bad" not in report


def test_results_are_those_of_the_checkpoints_reloaded(hard_run, tree):
    """The logged metric of a round is that of its checkpoint, predictions.csv that of the best."""
    out, _ = hard_run
    results, lines = json.loads((out / "results.json").read_text()), history(out)
    best = min(lines, key=lambda r: r["val_loss"])
    images = data.read_folder(str(tree), 20)
    rows = {r["path"]: r for r in csv.DictReader((out / "predictions.csv").open())}
    parts = {r["path"]: r["split"] for r in csv.DictReader((out / "split.csv").open())}
    assert {p for p, s in parts.items() if s in ("val", "test")} == set(rows)
    for which, path in (("best", out / "model.pt"), ("last", out / "last.pt")):
        content = models.read_file(path)
        model = models.build("toynet", 3)
        model.load_state_dict(content["state"])
        assert results[which]["round"] == content["round"]
        for part in ("val", "test"):
            index = np.array([i for i, p in enumerate(images.paths) if parts[p] == part])
            logits = evaluation.predict(model, images, index)
            m = metrics.measure(logits.numpy(), images.labels.numpy()[index], images.classes)
            assert m["loss"] == pytest.approx(results[which][part]["loss"], abs=1e-5)
            assert m["confusion"] == results[which][part]["confusion"]
            if which == "best":
                p = logits.softmax(1)
                for i, row in zip(index, p, strict=True):
                    written = [float(rows[images.paths[i]][f"p_{c}"]) for c in images.classes]
                    assert written == pytest.approx(row.tolist(), abs=1e-5)
                    assert rows[images.paths[i]]["prediction"] == images.classes[row.argmax()]
    assert results["best"]["round"] == best["round"]
    assert results["best"]["val"]["loss"] == best["val_loss"]
    assert results["last"]["val"]["loss"] == lines[-1]["val_loss"]
    assert results["images_seen"] == sum(c["images"] for r in lines for c in r["clients"])
    assert results["optimizer_steps"] == sum(c["steps"] for r in lines for c in r["clients"])


def test_same_command_same_bytes_in_another_process(hard_run, tree, tmp_path):
    assert same_run(hard_run[0], train(tree, tmp_path / "again", *HARD))
    more = [*HARD, "--model", "shufflenet_v2_x0_5", "--rounds", 2]  # one of torchvision's own
    done = script("--data", tree, *BASE, *more, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert same_run(tmp_path / "one", train(tree, tmp_path / "two", *more))


def test_another_seed_and_another_split_seed_differ(hard_run, tree, tmp_path):
    other = train(tree, tmp_path / "seed", *HARD, "--seed", 1)
    assert (other / "split.csv").read_bytes() == (hard_run[0] / "split.csv").read_bytes()
    assert history(other) != history(hard_run[0])
    third = train(tree, tmp_path / "split", *HARD, "--split-seed", 2, "--rounds", 1,
                  "--alpha", 9)
    assert (third / "split.csv").read_bytes() != (hard_run[0] / "split.csv").read_bytes()


# ---- kills --------------------------------------------------------------------------------------

@pytest.mark.parametrize("point,count", [
    ("half-written", 1),     # the starting state, half written: only run.json exists
    ("train_step", 2),       # in round 1: only the starting state exists
    ("half-written", 5),     # last.pt of a later round, half written
    ("append_history", 2),   # model.pt written, history.jsonl and last.pt not yet
    ("replace", 9),          # a complete temporary file, not yet renamed
    ("write_predictions", 1)])  # after training, before the results
def test_killed_and_resumed_equals_never_killed(hard_run, tree, tmp_path, point, count):
    out = tmp_path / "killed"
    kill(point, count, "train_federated", "--data", tree, *BASE, *HARD, "--out", out)
    assert not (out / "results.json").exists()
    train_federated.main(["--resume", str(out)])
    assert same_run(hard_run[0], out)
    assert not list(out.glob("*.tmp"))


def test_ctrl_c_ends_cleanly_and_says_how_to_resume(tree, whole, tmp_path, monkeypatch, capsys):
    original, calls = fedavg.train_step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(fedavg, "train_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            train(tree, tmp_path / "run")
    assert stop.value.code == 130
    assert f"train_federated.py --resume {tmp_path / 'run'}" in capsys.readouterr().err
    train_federated.main(["--resume", str(tmp_path / "run")])
    assert same_run(tmp_path / "run", whole)


# ---- evaluation does not leak -----------------------------------------------------------------

def test_test_part_is_touched_after_training_only_and_evaluating_changes_nothing(
        tree, tmp_path, monkeypatch):
    seen, steps = [], []
    predict, step = evaluation.predict, fedavg.train_step

    def counted(model, images, indices):
        seen.append((len(steps), set(indices.tolist())))
        return predict(model, images, indices)

    def stepped(*args, **kwargs):
        steps.append(1)
        return step(*args, **kwargs)
    monkeypatch.setattr(evaluation, "predict", counted)
    monkeypatch.setattr(fedavg, "train_step", stepped)
    one = train(tree, tmp_path / "one")
    rows = list(csv.DictReader((one / "split.csv").open()))
    test = {i for i, r in enumerate(rows) if r["split"] == "test"}
    touched = [when for when, indices in seen if indices & test]
    assert touched and set(touched) == {len(steps)}
    assert all(not indices & test or indices == test for _, indices in seen)
    # twice the evaluations, the same training
    monkeypatch.setattr(evaluation, "predict", lambda *a: (predict(*a), predict(*a))[1])
    assert same_run(one, train(tree, tmp_path / "two"))


def test_bn_local_measures_each_client_on_its_own_share(tree, tmp_path):
    out = train(tree, tmp_path / "local", "--bn", "local", "--partition", "dirichlet",
                "--clients", 3, "--alpha", 1)
    results = json.loads((out / "results.json").read_text())
    content = models.read_file(out / "model.pt")
    keys = set(models.batchnorm_keys(models.build("toynet", 3)))
    assert set(content["local_bn"]) == {0, 1, 2}
    assert all(set(s) == keys for s in content["local_bn"].values())
    for part in ("val", "test"):
        m = results["best"][part]
        shares = [c for c in m["clients"] if c]
        assert sum(c["n"] for c in shares) == m["n"] == 7
        pooled = np.sum([c["confusion"] for c in shares], 0)
        assert pooled.tolist() == m["confusion"]
        assert len({json.dumps(c["confusion"]) for c in shares}) > 1
    best = next(r for r in history(out) if r["round"] == results["best"]["round"])
    assert best["val_loss"] == results["best"]["val"]["loss"]
    resumed = tmp_path / "local2"
    train(tree, resumed, "--bn", "local", "--partition", "dirichlet", "--clients", 3, "--alpha", 1)
    assert same_run(out, resumed)
    assert "| client 2 | " in (out / "report.md").read_text().split("own BatchNorm")[1]


def test_each_client_is_measured_with_its_own_batchnorm():
    """Client 2 never trained: it has the shared one."""
    images, model = toy_images(12), BNNet()
    state, part = clone(model.state_dict()), np.array([1, 3, 4, 6, 7, 9])
    shares = [np.array([4, 9]), np.array([1, 7]), np.array([3, 6])]
    keys = models.batchnorm_keys(model)
    local_bn = {k: {key: state[key] + k + 1 for key in keys} for k in (0, 1)}
    measured = evaluation.Evaluation(model, images, {"test": part}, {"test": shares}).logits(
        "test", state, local_bn)
    for row, index in zip(measured, part, strict=True):
        owner = next(k for k, share in enumerate(shares) if index in share)
        model.load_state_dict(state | local_bn.get(owner, {}))
        alone = evaluation.predict(model, images, np.array([index]))[0].numpy()
        assert row == pytest.approx(alone, rel=1e-5)
        model.load_state_dict(state)
        shared = evaluation.predict(model, images, np.array([index]))[0].numpy()
        assert (row == pytest.approx(shared, rel=1e-3)) == (owner == 2)


def test_one_poisoned_client_is_survived_and_recorded(tree, tmp_path, monkeypatch, capsys):
    original = fedavg.train_local

    def poisoned(model, *args):
        record = original(model, *args)
        if args[6][2] == 1:  # the client of the key
            next(model.parameters()).data.fill_(float("inf"))
            record["loss"] = float("nan")
        return record
    monkeypatch.setattr(fedavg, "train_local", poisoned)
    out = train(tree, tmp_path / "run", "--rounds", 1)
    (record,) = history(out)
    assert [c["left_out"] for c in record["clients"]] == [False, True, False, False]
    assert record["clients"][1]["loss"] is None and "NaN" not in (out / "history.jsonl").read_text()
    kept = [c for c in record["clients"] if not c["left_out"]]
    assert record["train_loss"] == pytest.approx(
        sum(c["loss"] * c["images"] for c in kept) / sum(c["images"] for c in kept))
    assert all(v.isfinite().all() for v in models.read_file(out / "last.pt")["state"].values())
    assert "client 1 is not finite and is LEFT OUT" in capsys.readouterr().err


def test_early_stopping_keeps_the_best_and_can_be_turned_off(tree, tmp_path, monkeypatch):
    losses = [1.0, 0.5, 0.9, 0.8, 0.7, 0.1]

    def script_losses():
        scripted = iter(losses)
        monkeypatch.setattr(evaluation.Evaluation, "tally", lambda *a: [7, 0, 7 * next(scripted)])
    script_losses()
    out = train(tree, tmp_path / "stop", "--rounds", 6, "--early-stop", 3)
    assert len(history(out)) == 5 and models.read_file(out / "model.pt")["round"] == 2
    script_losses()
    out = train(tree, tmp_path / "all", "--rounds", 6, "--early-stop", 0, "--plateau", 0)
    assert len(history(out)) == 6 and models.read_file(out / "model.pt")["round"] == 6
    assert {r["lr"] for r in history(out)} == {0.01}


def test_best_round_is_the_earliest_on_ties_and_undefined_losses_never_win():
    rows = [{"round": r, "val_loss": v} for r, v in ((1, None), (2, 0.5), (3, 0.5), (4, 0.6))]
    assert evaluation.best_index(rows) == 1
    nothing = [r | {"val_loss": None} for r in rows]
    assert evaluation.best_index(nothing) == 3  # no validation: the last


def test_figures_of_a_round_are_pooled_over_the_images_of_those_averaged():
    clients = [{"images": 30, "steps": 3, "left_out": True, "loss": float("nan"), "accuracy": 0.0},
               {"images": 10, "steps": 1, "left_out": False, "loss": 1.0, "accuracy": 0.5},
               {"images": 30, "steps": 4, "left_out": False, "loss": 2.0, "accuracy": 1.0}]
    record = train_federated.make_record(4, 0.1, clients, [8, 6, 4.0], 2.0)
    assert record.pop("clients")[0]["loss"] is None
    assert record == {"round": 4, "lr": 0.1, "val_loss": 0.5, "val_accuracy": 0.75,
                      "train_loss": 70 / 40, "train_accuracy": 35 / 40, "images": 70, "steps": 8,
                      "seconds": 2.0, "images_per_second": 35}
    site = clients[1] | {"accuracy": None}  # a hospital keeps it to itself
    record = train_federated.make_record(1, 0.1, [site], [0, 0, 0.0], 2.0)
    assert (record["train_loss"], record["train_accuracy"], record["val_loss"]) == (1, None, None)


def test_the_progress_bar_counts_what_this_process_trains_on_and_one_process_shows_it(monkeypatch):
    monkeypatch.setattr(train_federated, "tqdm", lambda **more: more)
    args = run_folder.parse("x", train_federated.GROUPS, train_federated.defaults,
                            ["--local-epochs", "2", "--expand", "3", "--rounds", "9"])
    clients = [np.arange(5), np.arange(7), np.arange(11)]
    bar = train_federated.progress_bar(args, "run", clients, [0, 2], 4)
    assert (bar["total"], bar["desc"], bar["disable"]) == (2 * 3 * 16, "round 4/9", None)
    assert train_federated.progress_bar(args, None, clients, [], 4)["disable"] is True


@pytest.mark.parametrize(("best", "measured"), [(1, ["last", "best"]), (2, ["last"])])
def test_the_best_network_is_measured_by_itself_unless_it_is_the_last(tmp_path, monkeypatch, best,
                                                                      measured):
    def state(name, number):
        return {"state": name, "round": number, "local_bn": {}, "history": []}
    monkeypatch.setattr(models, "read_file", lambda path: state("best", best))
    monkeypatch.setattr("reporting.report.write_run", lambda *a: a)
    split = {"val": np.arange(2), "test": np.arange(2, 6)}
    looked = argparse.Namespace(images=toy_images(6), split=split, shares={}, logits=lambda part,
                                state, local_bn: (part, state))
    _, results, *_, logits, _ = evaluation.finish(
        tmp_path, argparse.Namespace(data=None, model="toynet"), looked, state("last", 2))
    assert results["synthetic"] and results["best"] == {"round": best}
    for name in ("last", "best"):
        assert logits[name] == {part: (part, name if name in measured else "last")
                                for part in split}


def test_all_updates_lost_stops_with_the_last_good_state(tree, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tree, tmp_path / "run", "--optimizer", "sgd", "--lr", "1e38", "--clip", "0")
    assert stop.value.code == 1
    assert "no client's update is finite" in capsys.readouterr().err
    last = models.read_file(tmp_path / "run" / "last.pt")
    assert all(v.isfinite().all() for v in last["state"].values())


def test_demonstration_defaults_yield_to_flags(tmp_path):
    def parse(*argv):
        return run_folder.parse("x", train_federated.GROUPS, train_federated.defaults, list(argv))
    assert parse().model == "resnet18" and parse().lr == 1e-3 and parse().weights == "none"
    assert parse("--model", "resnet50").model == "resnet50"
    assert parse("--lr", "1e-4").lr == 1e-4  # the paper's default, given on purpose
    real = parse("--data", "x")
    assert (real.model, real.weights, real.image_size, real.batch_size, real.lr) == (
        "resnet50", "imagenet", 224, 32, 1e-4)
    assert (real.clients, real.rounds, real.local_epochs, real.optimizer, real.weight_decay,
            real.clip, real.plateau, real.early_stop, real.split_seed, real.label_smoothing,
            real.mu, real.fraction, real.expand, real.augment, real.split, real.partition,
            real.bn, real.class_weights, real.sampler) == (
        None, 10, 5, "adamw", 1e-4, 1.0, 5, 10, 42, 0.0, 0.0, 1.0, 1, "paper", None, None,
        "average", "inverse", "shuffle")
    parts.settle(real, toy_images(20))  # what is not given follows from the images
    assert (real.clients, real.split, real.partition) == (4, "random", "iid")
    assert (real.timeout, real.folds, real.site_data, real.classes) == (1800, 1, None, None)
    assert parse("--site-data", "A=x").model == "resnet50"  # images of hospitals are no drawn ones
    small = parse("--mu", "0", "--timeout", "0.1", "--fraction", "0.1", "--rounds", "1",
                  "--local-epochs", "1")
    assert (small.mu, small.timeout, small.fraction, small.rounds, small.local_epochs) == (
        0, 0.1, 0.1, 1, 1)
    assert parse("--mu", "0.1", "--fraction", "1").mu == 0.1


def test_numbered_folders_by_default(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train_federated.main(["--data", str(tree), *BASE, "--rounds", "1"])
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    base = "federated-toynet-toy-seed0"
    assert names == [base, base + "-2"]
    assert os.listdir(tmp_path) == ["runs"]


def test_peak_memory_does_not_grow_with_the_number_of_clients(tmp_path):
    """4 and 64 clients over the same images, within 10 %: states are streamed, never collected.

    64 collected MobileNetV2 states would be 570 MB more, half of the whole process.
    """
    peaks = []
    program = ("import resource, sys, train_federated; train_federated.main(sys.argv[1:]); "
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    for clients in (4, 64):
        done = Process(program, [
            "--model", "mobilenet_v2", "--image-size", "16", "--rounds", "1", "--local-epochs", "1",
            "--augment", "none", "--clients", clients, "--out", tmp_path / str(clients)]).wait()
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


READINGS = [
    "--optimizer adam", "--optimizer sgd", "--lr 0.001", "--weight-decay 0.5", "--clip 0.001",
    "--clip 0", "--label-smoothing 0.1", "--class-weights none", "--sampler balanced",
    "--sampler dual", "--expand 2", "--augment translate", "--augment none", "--mu 9",
    "--fraction 0.5", "--bn recalibrate", "--bn freeze", "--bn local", "--train-from fc",
    "--amp bf16", "--amp fp16", "--batch-size 4", "--local-epochs 2", "--clients 3",
    "--image-size 24", "--model mobilenet_v3_small", "--seed 1", "--split-seed 1",
    "--partition dirichlet --alpha 9", "--partition dirichlet-equal", "--partition shards",
    "--split stratified", "--split stratified80", "--split grouped",
    "--remove scale-bar", "--remove colour", "--partition shards --classes-per-client 3"]


def test_every_reading_of_the_paper_runs_and_changes_the_run(tree, tmp_path, monkeypatch):
    """A flag that does nothing would repeat the run of the defaults, or that of another flag."""
    monkeypatch.setattr(evaluation, "finish_job", lambda *a: None)
    monkeypatch.setattr(models, "check_size", lambda *a: None)
    seen = {}
    for i, reading in enumerate(["", *READINGS]):
        out = train(tree, tmp_path / str(i), "--rounds", 1, "--amp", "off", *reading.split())
        last = models.read_file(out / "last.pt")["state"]
        key = hash((out / "split.csv").read_text()), tuple(
            round(v.double().sum().item(), 9) for v in last.values())
        assert key not in seen, f"{reading!r} is the same run as {seen[key]!r}"
        seen[key] = reading
