"""The pieces of a report from figures given by hand."""

import checks  # noqa: F401 - before torch

import pytest

from dataset.files import CLASSES
from reporting import pages


def share(value):
    return {"value": value, "low": None, "high": None}


def figures(value, n=8):
    return {"accuracy": share(value), "macro_f1": value, "kappa": value, "roc_auc": None, "n": n,
            "loss": 0.5}


SHOWN = ["0.2500 (no interval)", "0.2500", "0.2500", "–"]


def test_a_table_keeps_a_cell_in_its_line_and_its_column():
    assert pages.markdown(["a", "b"], [["x|y", "two\nlines"], [1, None]]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n| 1 | None |")


def test_best_and_last_have_a_row_for_each_part_that_was_measured():
    results = {"best": {"round": 3, "val": None, "test": figures(0.25)},
               "last": {"round": 4, "val": figures(0.25, 5), "test": figures(0.25)}}
    assert pages.summary_rows(results) == [
        ["best (round 3)", "test", 8, "0.5000", *SHOWN],
        ["last (round 4)", "val", 5, "0.5000", *SHOWN],
        ["last (round 4)", "test", 8, "0.5000", *SHOWN]]
    assert len(pages.SUMMARY) == len(pages.summary_rows(results)[0])


def test_the_best_colour_classifier_is_chosen_on_validation_never_on_test():
    rows = [{"features": kind, "classifier": name, "strip": "cut", "val": share(val),
             "test": share(test)} for kind, name, val, test in
            (("means", "1-nn", 0.5, 0.9), ("means", "svm", 0.75, 0.1),
             ("statistics", "1-nn", None, 0.1), ("statistics", "svm", None, 0.9))]
    found = [pages.best_colour_row({"colour_only": rows}, kind) for kind in ("means", "statistics")]
    assert [row["classifier"] for row in found] == ["svm", "1-nn"]


def test_folds_are_followed_by_their_mean_and_the_pooled_predictions():
    fold = {"name": "fold1", "train": 20, "epoch": 7, **figures(0.25)}
    results = {"members": [fold, fold | {"name": "fold2", "client": "NORTH"}],
               "mean": figures(0.25), "best": {"test": figures(0.25, 16)}}
    rows = pages.member_rows(results)
    assert rows == [["fold1", 20, 7, 8, *SHOWN], ["NORTH", 20, 7, 8, *SHOWN],
                    ["mean ± sd of 2", "", "", "", *SHOWN],
                    ["pooled, out of fold", "", "", 16, *SHOWN]]
    del results["best"]  # hospitals alone are not pooled
    assert pages.member_rows(results) == rows[:3]
    assert pages.client_rows([None, figures(0.25)], ["A", "B"]) == [
        ["A", 0, "–", "–"], ["B", 8, *SHOWN[:2]]]


def test_the_public_sets_are_known_by_their_classes_and_their_size():
    for classes, n, expected in ((CLASSES, 3256, True), (CLASSES, 3242, True),
                                 (CLASSES, 3255, False), (CLASSES[:3], 3256, False)):
        assert pages.is_all_set({"classes": list(classes), "images": n}) == expected


@pytest.mark.parametrize("synthetic", [True, False])
def test_the_head_has_command_cost_and_what_was_passed_over(tmp_path, synthetic):
    run = {"synthetic": synthetic, "script": "train_x.py", "argv": ["--lr", "1"], "images": 9,
           "data": "set", "git": "abc", "ignored_files": {} if synthetic else {"txt": 2},
           "machine": {"device": "cpu", "name": "x", "threads": 3, "torch": "2.9"}}
    text = pages.head(tmp_path / "name", run, {"images_seen": 90, "optimizer_steps": 12,
                                               "seconds": 4.6})
    loud = ("**SYNTHETIC DATA: drawn, not medical. Figures show that the code works, no more.**"
            "\n\n") * synthetic
    assert text == (
        f"# name\n\n{loud}`python train_x.py --lr 1`\n\n9 images of set; 90 training passes in 12 "
        "optimiser steps, 5 s on cpu (x, 3 threads), torch 2.9, commit abc."
        + ("" if synthetic else " Passed over: {'txt': 2}."))


def test_classes_have_their_figures_and_malignant_its_own_where_it_is_defined():
    row = dict.fromkeys(("precision", "recall", "specificity", "f1", "auc"), 0.25) | {"support": 3}
    test = {"per_class": {"a": row}, "malignant": None, "ece": 0.125, "brier": 0.5}
    text = pages.class_table(test, "of the best")
    assert text == (
        "### Per class (of the best)\n\n| class | precision | recall | specificity | F1 | AUC | "
        "support |\n| --- | --- | --- | --- | --- | --- | --- |\n| a | 0.2500 | 0.2500 | 0.2500 | "
        "0.2500 | 0.2500 | 3 |")
    test["malignant"] = {"sensitivity": share(0.75), "specificity": share(0.5)}
    assert pages.class_table(test, "of the best") == text + (
        "\n\nMalignant against benign: sensitivity 0.7500 (no interval), specificity 0.5000 (no "
        "interval). ECE 0.1250, Brier 0.5000.")


def test_every_figure_and_every_setting_but_false_and_none_is_listed(tmp_path):
    for name in ("b.png", "a.png", "c.csv"):
        (tmp_path / name).touch()
    text = pages.figures_and_settings(tmp_path, {"arguments": {
        "mu": 0.0, "skip_bad": False, "table": None, "remove": [], "local_only": True}})
    assert text == ("## Figures\n\n![a](a.png)\n\n![b](b.png)\n\n## Settings\n\n"
                    "| argument | value |\n| --- | --- |\n| mu | 0.0 |\n| remove | [] |\n"
                    "| local_only | True |")


def test_the_model_card_speaks_of_the_data_that_there_are(tmp_path):
    run = {"data": "set", "images": 9, "classes": ["a", "b"], "fingerprint": "0123456789abcdefgh",
           "synthetic": False, "arguments": {"split": "random", "split_seed": 42, "table": None}}

    def card(**changed):
        return pages.tail(tmp_path, run | changed, 2, 7, "0.5")
    text = card()
    assert "set, 9 images, classes a, b. Fingerprint `0123456789abcdef`." in text
    assert "images, `random`, split seed 42. " + pages.OWN["level"] in text
    assert "2 of 7 test images have an identical twin" in text
    assert "colour alone reaches 0.5" in text
    assert pages.SYNTHETIC["level"] in card(synthetic=True)
    assert pages.ALL_SET["level"] in card(classes=list(CLASSES), images=3256)
    assert pages.TABLE["level"] in card(arguments=run["arguments"] | {"table": "x.csv"})


def test_a_page_leaves_out_what_is_empty(tmp_path):
    pages.write_page(tmp_path, ["a", "", "b\n\n"])
    assert (tmp_path / "report.md").read_text() == "a\n\nb\n"
