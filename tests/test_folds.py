"""Federated cross-validation, its twins, the partition by stain, and what is published of runs."""

from checks import InputError

import argparse
import csv
import itertools
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import BASE, ROOT, SMALL, history, same_run, script, toy_images, train, write_tree

import compare
import train_central
import train_federated
from dataset import parts, splits
from dataset.images import colour_statistics
from reporting import finished, metrics, run_folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("folds") / "toy", {"Benign": 24, "Early": 24,
                                                                 "Pre": 24})


@pytest.fixture(scope="module")
def federated(tree, tmp_path_factory):
    """Three folds of three hospitals."""
    return train(tree, tmp_path_factory.mktemp("federated") / "run", "--rounds", 2, "--folds", 3,
                 "--clients", 3)


def rows(folder):
    with open(folder / "split.csv", **run_folder.CSV) as file:
        return list(csv.DictReader(file))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_folds_are_those_of_the_centre_part_by_part(tree, federated, tmp_path):
    out = tmp_path / "central"
    train_central.main(["--data", str(tree), *SMALL, "--folds", "3", "--epochs", "1", "--out",
                        str(out)])
    for name in ("", "fold1", "fold2", "fold3"):
        one, two = ([(r["path"], r["split"]) for r in rows(f / name)] for f in (federated, out))
        assert one == two
    tests = [r["path"] for k in (1, 2, 3) for r in rows(federated / f"fold{k}")
             if r["split"] == "test"]
    assert sorted(tests) == sorted(r["path"] for r in rows(federated))
    compare.main([str(federated), str(out), "--out", str(tmp_path / "c")])
    (test,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["tests"]
    assert test["n"] == 72 and test["difference"]["low"] < test["difference"]["high"]
    assert (tmp_path / "c" / "curves.png").exists()


def test_every_fold_is_a_whole_run_partitioned_anew_and_all_are_pooled(tree, federated, tmp_path):
    owners = [{r["path"]: r["client"] for r in rows(federated / f"fold{k}")} for k in (1, 2, 3)]
    assert owners[0] != owners[1]
    for k, owner in enumerate(owners, 1):
        assert set(owner.values()) == {"", "0", "1", "2"}
        assert (federated / f"fold{k}" / "report.md").exists()
        assert len(history(federated / f"fold{k}")) == 2
    pooled = results(federated)
    assert pooled["best"]["test"]["n"] == 72
    assert [m["name"] for m in pooled["members"]] == ["fold1", "fold2", "fold3"]
    hits = sum(results(federated / f"fold{k}")["best"]["test"]["accuracy"]["value"]
               * results(federated / f"fold{k}")["best"]["test"]["n"] for k in (1, 2, 3))
    assert pooled["best"]["test"]["accuracy"]["value"] * 72 == pytest.approx(hits)
    # the first fold alone, given as a table, is the same run: no fold leaves a trace in the next
    alone = train(tree, tmp_path / "alone", "--rounds", 2, "--table",
                  federated / "fold2" / "split.csv")
    assert same_run(alone, federated / "fold2")


def test_folds_resume_anywhere_and_processes_change_nothing(tree, federated, tmp_path, monkeypatch):
    flags = ["--data", str(tree), *BASE, "--rounds", "2", "--folds", "3", "--clients", "3"]
    original, calls = train_federated.evaluation.save_progress, []

    def stop(*a):
        original(*a)
        calls.append(a)
        if len(calls) == 3:  # in the middle of the second fold
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train_federated.evaluation, "save_progress", stop)
        with pytest.raises(SystemExit):
            train_federated.main([*flags, "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match="part of a larger run"):
        train_federated.main(["--resume", str(tmp_path / "run" / "fold2")])
    train_federated.main(["--resume", str(tmp_path / "run")])
    for name in ("fold1", "fold2", "fold3"):
        assert same_run(tmp_path / "run" / name, federated / name)
    for file in ("predictions.csv", "split.csv"):
        assert (tmp_path / "run" / file).read_bytes() == (federated / file).read_bytes()


def test_the_centre_and_each_hospital_take_the_folds_of_a_run(tree, federated, tmp_path, capsys):
    out = tmp_path / "like"
    train_central.main(["--like", str(federated), "--batch-size", "16", "--out", str(out)])
    assert "--batch-size is 16, and 8 in" in capsys.readouterr().err
    for name in ("fold1", "fold3"):
        assert [(r["path"], r["split"]) for r in rows(out / name)] == [
            (r["path"], r["split"]) for r in rows(federated / name)]
        assert [r["epoch"] for r in history(out / name)] == [1, 2]
    alone = tmp_path / "alone"
    train_central.main(["--like", str(federated), "--local-only", "--out", str(alone)])
    found = results(alone)
    assert [m["name"] for m in found["members"]] == ["client0", "client1", "client2"]
    assert "best" not in found and [m["n"] for m in found["members"]] == [72] * 3
    mine = {r["path"] for r in rows(alone / "client1" / "fold2") if r["split"] == "train"}
    assert mine == {r["path"] for r in rows(federated / "fold2") if r["client"] == "1"}
    several = compare.load(alone)
    assert len(several) == 3 and {len(r.test.paths) for r in several} == {72}
    compare.main([str(federated), str(alone), "--out", str(tmp_path / "c")])
    (test,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["tests"]
    assert test["n"] == 72


def test_folds_are_refused_to_hospitals_with_images_of_their_own(tmp_path):
    done = script("--site-data", "A=x", "B=y", "--folds", "2", "--out",
                  str(tmp_path / "x"), env={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                                            "LOCAL_WORLD_SIZE": "2"})
    assert done.returncode == 2 and "has one split: --folds 1" in done.stderr


# ---- stain --------------------------------------------------------------------------------------

def stained(n=120):
    """Images whose red rises with the class, and whose other channels rise with a stain."""
    images = toy_images(n, classes=3, size=4)
    rng = np.random.default_rng(0)
    stain = rng.permutation(n) / n
    labels = images.labels.numpy()
    pixels = images.pixels.numpy()
    pixels[:] = rng.integers(0, 4, pixels.shape)
    pixels[:, 0] += (40 * labels)[:, None, None].astype(np.uint8)
    pixels[:, 1:] += (100 * stain)[:, None, None, None].astype(np.uint8)
    return images, stain


def test_hospitals_differ_by_stain_and_not_by_class():
    images, stain = stained()
    labels, train_part = images.labels.numpy(), np.arange(0, 120, 2)
    x = colour_statistics(images.array(), "statistics")
    owner = splits.stain_owners(x, labels, images.paths, train_part, 4)
    for c in range(3):
        own = train_part[labels[train_part] == c]
        assert np.bincount(owner[own]).tolist() == [5, 5, 5, 5]
        order = own[np.argsort(stain[own])]  # the planted stain is what is found
        assert owner[order].tolist() == sorted(owner[order].tolist())
        rest = np.setdiff1d(np.flatnonzero(labels == c), train_part)
        for k in range(3):  # other images: by the cuts of the training part of their class
            cut = stain[own[owner[own] == k]].max()
            assert (owner[rest[stain[rest] <= cut - 0.03]] <= k).all()
            assert (owner[rest[stain[rest] >= cut + 0.03]] > k).all()
    again = splits.stain_owners(x[::-1], labels[::-1], images.paths[::-1], 119 - train_part[::-1],
                                4)
    assert np.array_equal(again[::-1], owner)  # the order of the images changes nothing


@pytest.mark.parametrize("odd", range(3))
def test_a_class_that_stands_apart_in_many_colours_does_not_hide_the_stain(odd):
    """Eight columns tell one class from the others, a single one holds the stain."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    stain = rng.permutation(60).astype(float)
    apart = 20 * (labels == odd)[:, None] + rng.normal(size=(60, 8))
    owner = splits.stain_owners(np.column_stack([apart, stain]), labels, list(map(str, range(60))),
                                np.arange(60), 2)
    for c in range(3):
        own = np.flatnonzero(labels == c)
        assert np.array_equal(owner[own], stain[own] > np.median(stain[own]))


def test_identical_images_are_cut_by_path_and_constant_colour_is_no_error():
    labels, paths = np.zeros(6, int), list("fedcba")
    owner = splits.stain_owners(np.ones((6, 21)), labels, paths, np.arange(6), 3)
    assert owner.tolist() == [2, 2, 1, 1, 0, 0]


def test_a_run_by_stain_prints_the_size_of_the_shift_and_judges_each_on_its_own(tree, tmp_path,
                                                                              capsys):
    out = train(tree, tmp_path / "run", "--rounds", 1, "--partition", "stain", "--clients", 2,
                "--bn", "local")
    assert "mean red of the hospitals " in capsys.readouterr().out
    _, images = finished.load_images(out)
    split, clients, _ = run_folder.read_split(out, images)
    args = train_federated.run_folder.read_run(out)["arguments"]
    assert args["partition"] == "stain" and (out / "clients.png").exists()
    shares = parts.deal_part(argparse.Namespace(**args), images, split["test"], clients)
    told = results(out)["best"]["test"]["clients"]
    assert [0 if c is None else c["n"] for c in told] == list(map(len, shares))
    assert np.array_equal(np.sort(np.concatenate(shares)), split["test"])


# ---- published ----------------------------------------------------------------------------------

def recomputed(folder):
    """The figures that the predictions of a published run give."""
    run = json.loads((folder / "run.json").read_text())
    test = finished.read_predictions(folder)
    p = np.exp(test.logits)
    return run, test, p


def check_published(folder):
    """results.json says what predictions.csv gives; no path of a machine is in run.json."""
    _, test, p = recomputed(folder)
    told = results(folder)["best"]["test"]
    assert told["n"] == len(test.paths)
    assert told["accuracy"]["value"] == pytest.approx((p.argmax(1) == test.labels).mean())
    assert np.trace(np.array(told["confusion"])) == (p.argmax(1) == test.labels).sum()
    assert not [x for x in (folder / "run.json").read_text().split('"') if x.startswith("/")]


def test_a_published_run_is_compared_like_the_run_itself(federated, tmp_path):
    publish = runpy.run_path(str(ROOT / "benchmarks" / "publish.py"))["publish"]
    audited = shutil.copytree(federated, tmp_path / "run")
    (audited / "privacy").mkdir()
    (audited / "privacy" / "privacy.json").write_text(
        '{"run": "/tmp/place/run", "why": "python x.py --like /tmp/place/run --a b/c"}')
    for run, name in ((audited, "one"), (federated, "two")):
        publish(run, tmp_path / name)
    files = {p.name for p in (tmp_path / "two").rglob("*") if p.is_file()}
    assert files == {"run.json", "results.json", "history.jsonl", "split.csv", "predictions.csv"}
    assert (tmp_path / "one" / "privacy" / "privacy.json").read_text() == (
        '{"run": "run", "why": "python x.py --like run --a b/c"}\n')
    check_published(tmp_path / "one")
    compare.main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c")])
    table = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert table["rows"][next(iter(table["rows"]))]["accuracy"] == (
        results(federated)["best"]["test"]["accuracy"])
    with pytest.raises(InputError, match="not complete"):
        publish(tmp_path, tmp_path / "x")
    with pytest.raises(InputError, match="exists already"):
        publish(federated, tmp_path / "one")


PUBLISHED = sorted((ROOT / "results").glob("**/predictions.csv"))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: str(file.relative_to(ROOT).parent))
def test_every_committed_table_is_what_its_predictions_give(file):
    check_published(file.parent)


def test_the_committed_comparison_of_folds_is_what_their_predictions_give(tmp_path):
    """Of the three that README compares in words, too."""
    told = json.loads((ROOT / "results" / "folds-comparison.json").read_text())
    names = ["folds-fedavg-iid", "folds-central", "folds-central-batch128"]
    compare.main([*(str(ROOT / "results" / name) for name in names), "--out", str(tmp_path / "c")])
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert {name: told["rows"][name] for name in names} == {
        name: found["rows"][name] for name in names}
    by_pair = {(test["a"], test["b"]): test for test in told["tests"]}
    runs = [name for name in told["rows"] if name.startswith("folds-")]
    assert list(by_pair) == list(itertools.combinations(runs, 2))
    words = " ".join((ROOT / "README.md").read_text("utf-8").replace("−", "-").split())
    for pair in found["tests"]:
        assert by_pair[pair["a"], pair["b"]] == pair and (pair["n"], pair["units"]) == (3256, 2760)
        value, low, high = (f"{pair['difference'][key]:+.4f}" for key in ("value", "low", "high"))
        assert pair["a"] == "folds-central" or f"{value} ({low} … {high})" in words
    assert [told["rows"][name]["accuracy"]["value"] * 3256 for name in names] == pytest.approx(
        [3203, 3227, 3208])


def test_the_committed_comparison_of_seeds_is_what_their_predictions_give(tmp_path):
    runs = [ROOT / "results" / f"{kind}-10x5-seed{seed}" for kind in ("fedavg-iid", "central")
            for seed in range(3)]
    compare.main([*map(str, runs), "--out", str(tmp_path / "c")])
    told = json.loads((ROOT / "results" / "seeds-comparison.json").read_text())
    assert told == json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [sum(m[key] for m in told["tests"][0]["mcnemar"]) for key in ("a_only", "b_only")] == [
        3, 2]


def test_the_models_of_the_last_round_are_told_as_they_are():
    """Of the run that the text names: right answers out of 3,256, over the folds."""
    page = " ".join((ROOT / "docs" / "results.md").read_text("utf-8").split())
    for name, words in (
            ("fedavg-iid", "FedAvg IID 3215"), ("central", "the centre 3213"),
            ("central-batch128", "at batch 128 3217"), ("fedavg-dirichlet", "Dirichlet 3196"),
            ("fedavg-stain", "by staining 3202"), ("central-40", "have 3230 right"),
            ("dirichlet-recalibrate", "(3226 right"), ("dirichlet-plain", "to 3194)")):
        tests = [results(ROOT / "results" / f"folds-{name}" / f"fold{k}")["last"]["test"]
                 for k in range(1, 6)]
        hits = sum(round(test["accuracy"]["value"] * test["n"]) for test in tests)
        assert str(hits) in words and words in page


def test_what_the_last_models_predict_gives_the_differences_on_the_page():
    page = " ".join((ROOT / "docs" / "results.md").read_text("utf-8").replace("−", "-").split())
    with open(ROOT / "results" / "last-round.csv", encoding="utf-8", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    chosen, last = {}, {}
    for name in ("folds-central-40", "folds-dirichlet-plain", "folds-dirichlet-recalibrate"):
        (run,) = compare.load(ROOT / "results" / name)
        chosen[name], test = run.correct(), run.test
        last[name] = np.array([rows[path][name] == test.classes[y]
                               for path, y in zip(test.paths, test.labels, strict=True)])
        folds = [results(ROOT / "results" / name / f"fold{k}")["last"]["test"] for k in range(1, 6)]
        assert last[name].sum() == sum(np.trace(np.array(fold["confusion"])) for fold in folds)
    members = splits.numbered(run.units[1])
    plain, recalibrated = "folds-dirichlet-plain", "folds-dirichlet-recalibrate"
    for a, b in ((last["folds-central-40"], chosen["folds-central-40"]),
                 (last[plain], chosen[plain]), (last[recalibrated], chosen[recalibrated]),
                 (last[recalibrated], last[plain])):
        found = metrics.paired_difference(a.astype(float), b.astype(float), members, "group")
        value, low, high = (f"{found[key]:+.4f}" for key in ("value", "low", "high"))
        assert f"{value} ({low} … {high})" in page


@pytest.mark.parametrize(("name", "runs"), [
    ("recalibrate-comparison", [
        "folds-dirichlet-recalibrate", "folds-dirichlet-plain", "folds-fedavg-dirichlet",
        "folds-fedavg-iid", "folds-central", "folds-central-batch128"]),
    ("dirichlet-fold1-comparison", [
        "folds-dirichlet-plain/fold1", "folds-dirichlet-recalibrate/fold1", "fold1-dirichlet-*",
        "folds-fedavg-dirichlet/fold1"]),
    ("readings-comparison", ["fedavg-iid-10x5-seed0", "default-adam", "default-smoothing",
                             "default-train-from", "default-dual"]),
    ("blocked-comparison", ["blocked-fedavg", "blocked-central"]),
    ("central40-comparison", ["folds-central-40", "folds-central", "folds-fedavg-iid"]),
    ("stain-fold1-comparison", ["folds-fedavg-stain/fold1", "fold1-stain-*"]),
    ("iid-fold1-comparison", ["folds-fedavg-iid/fold1", "fold1-iid-*"])])
def test_the_committed_comparisons_of_remedies_are_what_their_predictions_give(
        tmp_path, monkeypatch, name, runs):
    monkeypatch.chdir(ROOT)
    runs = [str(found) for run in runs for found in sorted(Path("results").glob(run))]
    compare.main([*runs, "--out", str(tmp_path / "c")])
    told = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert told == json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert len(told["tests"]) == len(runs) * (len(runs) - 1) / 2


def test_the_committed_audit_of_a_run_is_of_its_predictions_and_its_intervals_are_newcombes():
    folder = ROOT / "results" / "blocked-fedavg"
    _, test, p = recomputed(folder)
    audit, right = json.loads((folder / "audit" / "audit.json").read_text()), p.argmax(1)
    n, hits = len(right), int((right == test.labels).sum())
    assert (audit["n"], audit["accuracy"]) == (n, metrics.wilson(hits, n))
    benign = test.classes.index("Benign")
    assert audit["called_benign"] == [path for path, said, is_ in zip(
        test.paths, right, test.labels, strict=True) if said == benign != is_]
    for probe in audit["probes"].values():
        a, b = probe["mcnemar"]["a_only"], probe["mcnemar"]["b_only"]
        assert probe["accuracy"] == metrics.wilson(hits - a + b, n)
        assert probe["difference"] == metrics.newcombe(hits - a, a, b, n - hits - b)


@pytest.mark.parametrize("name", ["alone-iid-10x5-seed0", "alone-iid-10x5-seed1", "folds-alone"])
def test_committed_hospitals_alone_have_the_mean_of_their_predictions(name):
    whole = ROOT / "results" / name
    values = []
    for k in range(4):
        _, test, p = recomputed(whole / f"client{k}")
        values.append((p.argmax(1) == test.labels).mean())
    assert results(whole)["mean"]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert results(whole)["mean"]["accuracy"]["sd"] == pytest.approx(np.std(values, ddof=1))
