"""The end of a run, called directly: what is counted, what is drawn, what stands on the page."""

import checks  # noqa: F401 - before torch

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import toy_images

from reporting import figures, metrics, report
from reporting.baselines import colour_features
from reporting.terminal import show

LOGITS = np.array([[3, 0, 1], [0, 2, 1], [2, 1, 0], [0, 1, 3]], dtype=np.float32)
RUN = {"synthetic": False, "script": "train_x.py", "argv": [], "images": 9, "data": "toy",
       "git": "abc", "ignored_files": "", "bad_files": [],
       "classes": ["c0", "c1", "c2"], "fingerprint": "f" * 64,
       "machine": {"device": "cpu", "name": "chip", "threads": 2, "torch": "2.1"},
       "arguments": {"split": "random", "split_seed": 42, "table": None, "remove": []}}


@pytest.fixture
def drawn(monkeypatch):
    """Name of the file → arguments of the function that would have drawn it."""
    calls = {}
    for name in ("plot_curves", "plot_confusion", "plot_roc", "plot_clients"):
        def note(*arguments):
            path = next(x for x in arguments if isinstance(x, Path))
            calls[path.name] = [x for x in arguments if x is not path]
        monkeypatch.setattr(figures, name, note)
    return calls


def in_run(folder, **changes):
    (folder / "run.json").write_text(json.dumps(RUN | changes))
    return folder


def record(epoch, **more):
    return {"epoch": epoch, "images": 10, "steps": 2, "seconds": 0.5} | more


# ---- what is counted ----------------------------------------------------------------------------

def test_the_cost_is_the_sum_over_rounds_or_over_whole_runs():
    assert report.budget([record(1), record(2, images=7, steps=1, seconds=0.25)]) == {
        "images_seen": 17, "optimizer_steps": 3, "seconds": 0.75}
    runs = [{"images_seen": 100, "optimizer_steps": 9, "seconds": 2.0}] * 2
    assert report.budget(runs) == {"images_seen": 200, "optimizer_steps": 18, "seconds": 4.0}


def test_each_client_is_measured_on_its_own_share_and_none_where_it_has_no_image():
    images, indices = toy_images(9), np.array([1, 3, 4, 8])
    labels = images.labels.numpy()
    shares = [np.array([3, 8]), np.array([], int), np.array([1, 4])]
    m = report.measure(images, indices, LOGITS, shares)
    assert m["clients"] == [metrics.measure(LOGITS[[1, 3]], labels[[3, 8]], images.classes), None,
                            metrics.measure(LOGITS[[0, 2]], labels[[1, 4]], images.classes)]
    del m["clients"]
    assert m == metrics.measure(LOGITS, labels[indices], images.classes)
    assert report.measure(images, indices, LOGITS, None) == m


def test_patients_are_counted_among_the_images_of_the_part_alone():
    images = toy_images(9)
    images.known["patient"] = np.array(list("aabbccdde"))
    m = report.measure(images, np.array([1, 3, 4, 8]), LOGITS, None)
    assert m["by_patient"]["n"] == 4 and "by_group" not in m
    assert report.measure(images, np.array([2, 3, 4, 5]), LOGITS, None)["by_patient"]["n"] == 2


def test_colour_over_folds_is_the_sum_of_right_images():
    def fold(n, value, fitted_on):
        return {"best": {"val": {"n": 2}, "test": {"n": n}}, "colour_only": [
            {"features": "means", "fitted_on": fitted_on, "val": metrics.wilson(1, 2),
             "test": {"value": value, "low": 0, "high": 1}}]}
    undefined = fold(2, None, 5)  # measured nothing: no hit, and no image either
    (row,) = report.pooled_colour([fold(8, 0.25, 5), fold(10, 0.3, 5), undefined])
    assert row == {"features": "means", "fitted_on": 5, "test": metrics.wilson(5, 18),
                   "val": metrics.wilson(3, 6)}
    assert report.pooled_colour([fold(8, 0.25, 5)])[0]["test"] == metrics.wilson(2, 8)
    undefined["best"]["val"], undefined["colour_only"][0]["val"] = None, metrics.wilson(0, 0)
    (row,) = report.pooled_colour([undefined] * 2)
    assert row["val"] == row["test"] == {"value": None, "low": None, "high": None}


# ---- what stands on the page --------------------------------------------------------------------

def test_the_results_name_patients_on_both_sides_and_the_intervals_of_new_ones():
    images = toy_images(8)
    images.known["patient"] = np.array(list("aabbccdd"))
    by = {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}, "malignant": None,
          "macro_f1": {"low": 0.1, "high": 0.2}, "kappa": {"low": None, "high": None},
          "roc_auc": {"low": None, "high": None}, "reason": None}
    test = {"macro_f1": 0.15, "kappa": 0.5, "roc_auc": None, "by_patient": by}
    split = {"train": np.array([0, 1, 2]), "val": np.array([4]), "test": np.array([5, 6, 7])}
    found = report.unit_sections(images, [split], test)
    table = ("| figure | value (95 %, patients) |\n| --- | --- |\n"
             "| accuracy | 0.5000 (0.2500–0.7500) |\n")
    rest = ("| macro f1 | 0.1500 (0.1000–0.2000) |\n| kappa | 0.5000 (no interval) |\n"
            "| roc auc | – |")
    assert found == ["## Results", "### By patient: intervals that count patients",
                     "Patients: 2 in train, 1 in val, 2 in test. Best model, test part.",
                     table + rest]
    by |= {"reason": "no interval: 1 of 2 patients", "malignant": {
        "sensitivity": by["accuracy"], "specificity": {"value": None, "low": None, "high": None}}}
    again = {"train": np.array([0, 4]), "val": np.array([7]), "test": np.array([1, 5])}
    warned, _, _, counts, rows, reason = report.unit_sections(images, [split, again], test)
    assert warned == ("**WARNING: 2 patient(s) have images in the training part and in the test "
                      "part, so that the test figures are not those of new patients.**")
    assert counts == "Patients: 3 in test. Best model, test part."  # all are in training in folds
    assert rows == (f"{table}| sensitivity | 0.5000 (0.2500–0.7500) |\n| specificity | – |\n{rest}")
    assert reason == "No interval: 1 of 2 patients."
    assert report.unit_sections(toy_images(8), [split], {}) == ["## Results"]


def test_a_report_that_fails_says_why_and_where_the_figures_stand(capsys):
    with report.decoration():
        raise ValueError("two\nlines")
    with report.decoration("x.json"):
        raise KeyError("k")
    assert capsys.readouterr().err.splitlines() == [
        ("WARNING: the report is not complete (ValueError: two lines); every figure stands in "
         "results.json"),
        "WARNING: the report is not complete (KeyError: 'k'); every figure stands in x.json"]


def test_a_report_is_announced_where_there_is_one(tmp_path, capsys):
    report.print_place(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "report.md").touch()
    report.print_place(tmp_path)
    assert capsys.readouterr().out == f"report: {tmp_path}/report.md\n"


def test_the_figures_of_a_run_are_those_of_its_best_model_on_the_test_part(tmp_path, drawn):
    images, test = toy_images(9), np.array([1, 3, 4, 8])
    images.digests[8] = images.digests[0]  # a twin in training
    split = {"train": np.array([0, 2, 5, 6]), "val": np.array([7]), "test": test}
    clients = [np.array([0, 2]), np.array([5, 6])]
    m = report.measure(images, test, LOGITS, [np.array([3, 8]), np.array([1, 4])])
    other = report.measure(images, test, LOGITS[::-1], None)
    colour = [{"features": kind, "strip": "cut", "classifier": "1-nn", "fitted_on": 4,
               "val": metrics.wilson(1, 1), "test": metrics.wilson(hits, 4)}
              for kind, hits in (("means", 1), ("statistics", 3))]
    results = {"best": {"round": 2, "val": other, "test": m}, "seconds": 1.0,
               "last": {"round": 3, "val": other, "test": other}, "colour_only": colour,
               "images_seen": 12, "optimizer_steps": 3}
    lines = [{"round": 1}]
    report.draw_run(in_run(tmp_path), results, lines, images, split, LOGITS, clients)
    assert set(drawn) == {"history.png", "confusion.png", "roc.png", "clients.png"}
    assert drawn["history.png"] == [[lines], "round", 2]
    assert drawn["confusion.png"] == [m["confusion"], images.classes, "best model, test"]
    assert drawn["roc.png"][0] is LOGITS and drawn["roc.png"][2:] == [images.classes,
                                                                      m["per_class"]]
    assert drawn["roc.png"][1].tolist() == [1, 0, 1, 2]
    assert np.array_equal(drawn["clients.png"][2], colour_features(images)["means", "included"])
    page = (tmp_path / "report.md").read_text("utf-8")
    assert "Best = lowest validation loss, the earliest on ties; the test part was touched " \
        "after training only." in page
    assert page.count("### Per class (best model, test)") == 1
    assert "### Each client on its own share of the test part (own BatchNorm)\n\n| client | n | " \
        "accuracy (95 %) | macro F1 |\n| --- | --- | --- | --- |\n| client 0 | 2 | " in page
    assert "1 of 4 test images have an identical twin in the training part" in page
    assert f"colour alone reaches {show(metrics.wilson(3, 4))} on the same" in page
    del m["clients"]
    results["best"]["val"] = None
    drawn.clear()
    report.draw_run(tmp_path, results, lines, images, split, LOGITS, None)
    page = (tmp_path / "report.md").read_text("utf-8")
    assert "clients.png" not in drawn and "own BatchNorm" not in page
    assert "\n\nNo validation part: the last epoch is scored.\n\n| model |" in page
    results["best"]["val"] = other
    report.draw_run(tmp_path, results, lines, images, split | {"val": test}, LOGITS, None)
    page = (tmp_path / "report.md").read_text("utf-8")
    assert ("**WARNING: the model is selected on its own test part (the paper's Table 1), so that "
            "the test figures are optimistic.**\n\n## Results") in page
    assert "ties; the test part was touched for this, too." in page


def test_the_figures_of_folds_are_pooled_and_their_curves_are_drawn_together(tmp_path, drawn):
    images, folder = toy_images(9), in_run(tmp_path)
    images.digests[3], images.digests[8] = images.digests[2], images.digests[5]
    several = {}
    for name, test in (("fold1", [1, 3]), ("fold2", [4, 8])):
        several[name] = [{"test": np.array(test), "train": np.array([0, 2, 5]),
                          "val": np.array([6, 7])}]
        (folder / name).mkdir()
        (folder / name / "history.jsonl").write_text(json.dumps(record(1)) + "\n")
    m = report.measure(images, np.array([1, 3, 4, 8]), LOGITS, None)
    colour = [{"features": kind, "strip": "cut", "classifier": "1-nn", "fitted_on": 4,
               "val": metrics.wilson(0, 0), "test": metrics.wilson(hits, 4)}
              for kind, hits in (("means", 1), ("statistics", 3))]
    results = {"members": [m | {"name": name, "train": 3, "epoch": 1, "n": 2} for name in several],
               "mean": {key: metrics.mean_sd([m[key]] * 2) for key in metrics.FIGURES},
               "best": {"test": m}, "colour_only": colour, "images_seen": 6, "optimizer_steps": 2,
               "seconds": 1.0}
    report.draw_pooled(folder, results, images, several)
    assert set(drawn) == {"curves.png", "confusion.png"}
    assert drawn["curves.png"] == [[[record(1)], [record(1)]], "epoch"]
    assert drawn["confusion.png"] == [m["confusion"], RUN["classes"], "out of fold"]
    page = (folder / "report.md").read_text("utf-8")
    assert "| pooled, out of fold |" in page and "| mean ± sd of 2 |" in page
    assert "The standard deviation over folds is no standard error" in page
    assert "### Per class (pooled, out of fold)" in page
    assert "2 of 4 test images have an identical twin in the training part" in page
    assert f"colour alone reaches {show(metrics.wilson(3, 4))} on the same" in page
    drawn.clear()
    del results["best"]
    both = {"client0": [*several["fold1"], *several["fold2"]], "fold2": several["fold2"]}
    report.draw_pooled(folder, results, images, both)
    assert drawn == {"curves.png": [[[record(1)]], "epoch"]}  # parts with folds draw their own
    page = (folder / "report.md").read_text("utf-8")
    assert "out of fold" not in page and "### What colour alone" not in page
    assert "colour alone reaches what the report of each part says on the same" in page


def test_hospitals_are_pooled_by_their_counts_and_each_has_a_row(tmp_path, drawn, capsys):
    one, two = [[5, 1], [0, 4]], [[2, 0], [2, 6]]
    told = {which: {part: [(one, 10, 0.5), (two, 10, loss)] for part in ("val", "test")}
            for which, loss in (("last", None), ("best", 1.5))}
    results = {"data": "NORTH, SOUTH", "sites": ["NORTH", "SOUTH"], "last": {"round": 3},
               "best": {"round": 2}}
    classes = ["Benign", "Early"]
    lines = [{"round": 1, "images": 16, "steps": 4, "seconds": 1.0}]
    report.write_sites(in_run(tmp_path), results, told, lines, classes)
    found = json.loads((tmp_path / "results.json").read_text())
    best = found["best"]["test"]
    assert best["confusion"] == [[7, 1], [2, 10]] and best["n"] == 20
    assert best["loss"] == 1.0 and best["accuracy"] == metrics.wilson(17, 20)
    assert [c["loss"] for c in best["clients"]] == [0.5, 1.5]
    assert [c["confusion"] for c in best["clients"]] == [one, two]
    assert best["malignant"]["sensitivity"] == metrics.wilson(10, 12)
    assert best["roc_auc"] is best["ece"] is best["brier"] is best["per_class"]["Early"]["auc"]
    assert best["roc_auc"] is None
    assert found["last"]["test"]["loss"] is found["last"]["val"]["clients"][1]["loss"] is None
    assert (found["images_seen"], found["optimizer_steps"], found["colour_only"]) == (16, 4, [])
    assert drawn == {
        "history.png": [[lines], "round", 2],
        "confusion.png": [best["confusion"], classes, "best model, test parts of all sites"]}
    page = (tmp_path / "report.md").read_text("utf-8")
    assert page.startswith(
        f"# {tmp_path.name}\n\nSites: NORTH, SOUTH. 16 training passes in 4 optimiser steps, commit"
        " abc.\n\n## Results\n\nBest = lowest validation loss pooled over sites, the earliest on "
        "ties.\n\n| model |")
    accuracy = show(metrics.wilson(9, 10))
    assert "### Each site on its own test part (best model)\n\n| site | n | accuracy (95 %) | " \
        f"macro F1 |\n| --- | --- | --- | --- |\n| NORTH | 10 | {accuracy} | " in page
    assert "### Per class (best model, test parts of all sites)" in page
    assert "stands in SECURITY.md. Research and teaching only, not a medical device." in page
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["model", "part", "n", "loss"]
    assert out[-1] == f"report: {tmp_path}/report.md"
    assert [line.split()[0] for line in out[-4:-1]] == ["site", "NORTH", "SOUTH"]
