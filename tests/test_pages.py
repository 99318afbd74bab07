"""The words and tables of reports: every number at its place, with the digits that are meant."""

import checks  # noqa: F401 - before torch

import pytest

from reporting import pages, terminal


def proportion(value, low=0.25, high=0.75):
    return {"value": value, "low": low, "high": high}


def scored(accuracy=0.5, **changes):
    """What a table shows of one part."""
    return {"n": 7, "loss": 1.25, "accuracy": proportion(accuracy), "macro_f1": 0.4, "kappa": None,
            "roc_auc": 1.0} | changes


def colour(kind, strip, val, test, classifier="1-nn"):
    return {"features": kind, "strip": strip, "classifier": classifier, "fitted_on": 58,
            "val": proportion(val), "test": proportion(test)}


# ---- numbers ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("figure", "text"), [
    (0.98765, "0.9877"), (0, "0.0000"), (None, "–"),
    ({"value": 0.0, "low": 0.0, "high": 0.30849}, "0.0000 (0.0000–0.3085)"),
    ({"value": 0.5, "low": None, "high": None}, "0.5000 (no interval)"),
    ({"value": None, "low": None, "high": None}, "–"),
    ({"mean": 0.98151, "sd": 0.00314, "n": 3}, "0.9815 ± 0.0031"),
    ({"mean": 0.0, "sd": 0.0, "n": 2}, "0.0000 ± 0.0000"),
    ({"mean": 0.5, "sd": None, "n": 1}, "0.5000"), ({"mean": None, "sd": None, "n": 0}, "–")])
def test_a_figure_is_shown_with_four_digits_and_what_is_undefined_as_a_dash(figure, text):
    assert terminal.show(figure) == text


def test_the_number_of_digits_can_be_chosen():
    assert [terminal.show(1.26, digits) for digits in (0, 1, 3)] == ["1", "1.3", "1.260"]


def test_the_columns_of_a_table_are_as_wide_as_their_widest_cell(capsys):
    terminal.print_table(["a", "bc", "d"], [["xyz", 1, ""], ["", 234, 5]])
    assert capsys.readouterr().out == "a    bc   d\nxyz  1\n     234  5\n"


def test_the_lines_of_a_round_name_its_clients_and_their_figures(capsys):
    ours = {"client": 1, "num_examples": 29, "steps": 4, "loss": 0.12345, "accuracy": 0.98765,
            "update_norm": 2.34567, "left_out": False, "skipped_steps": 0}
    other = ours | {"client": 0, "left_out": True, "skipped_steps": 2, "loss": None}
    far = ours | {"site": "NORTH", "skipped_steps": None}
    terminal.print_round({
        "round": 2, "clients": [ours, other, far], "train_loss": 1.0, "val_loss": 0.5,
        "val_accuracy": 0.75, "lr": 0.001, "images_per_second": 12.345}, 5, ["a", "b"])
    assert capsys.readouterr().out.splitlines() == [
        "  b: 29 images, 4 steps, loss 0.1235, accuracy 0.988, update norm 2.346, skipped 0",
        ("  a: 29 images, 4 steps, loss –, accuracy 0.988, update norm not finite, left out, "
         "skipped 2"),
        "  NORTH: 29 images, 4 steps, loss 0.1235, accuracy 0.988, update norm 2.346, skipped –",
        ("round 2/5: train loss 1.0000, val loss 0.5000, val accuracy 0.7500, lr 0.001, 12.3 "
         "images/s")]


# ---- tables -------------------------------------------------------------------------------------

def test_the_summary_has_a_row_for_each_model_and_part_that_there_is():
    results = {"best": {"epoch": 2, "val": scored(), "test": scored(0.0)},
               "last": {"epoch": 3, "val": None, "test": scored(None)}}
    rest = ["0.4000", "–", "1.0000"]
    header, rows = pages.summary(results)
    assert len(header) == 8 and rows == [
        ["best (epoch 2)", "val", 7, "1.2500", "0.5000 (0.2500–0.7500)", *rest],
        ["best (epoch 2)", "test", 7, "1.2500", "0.0000 (0.2500–0.7500)", *rest],
        ["last (epoch 3)", "test", 7, "1.2500", "–", *rest]]


def test_the_table_of_members_ends_in_their_mean_and_the_pooled_predictions():
    def member(name, **more):
        return scored() | {"name": name, "train": 30, "epoch": 4} | more
    results = {"members": [member("fold1"), member("client0", client="NORTH")], "mean": {
        key: {"mean": 0.5, "sd": 0.1, "n": 2} for key in ("accuracy", "macro_f1", "kappa",
                                                          "roc_auc")}}
    figures = ["0.5000 (0.2500–0.7500)", "0.4000", "–", "1.0000"]
    expected = [["fold1", 30, 4, 7, *figures], ["NORTH", 30, 4, 7, *figures],
                ["mean ± sd of 2", "", "", "", *["0.5000 ± 0.1000"] * 4]]
    assert pages.members(results)[1] == expected and len(pages.members(results)[0]) == 8
    results["best"] = {"test": scored(0.25, n=14)}
    assert pages.members(results)[1] == [
        *expected, ["pooled, out of fold", "", "", 14, "0.2500 (0.2500–0.7500)", *figures[1:]]]


def test_a_client_without_an_image_in_the_part_has_a_row_of_dashes():
    header, rows = pages.clients("site", [None, scored()], ["a", "b"])
    assert header[0] == "site" and rows == [
        ["a", 0, "–", "–"], ["b", 7, "0.5000 (0.2500–0.7500)", "0.4000"]]


def test_the_best_row_of_colour_is_the_best_on_validation_and_else_the_first_svm(capsys):
    rows = [colour("means", "included", 0.25, 1.0), colour("statistics", "included", None, 0.75),
            colour("statistics", "cut", 0.0, 0.5), colour("statistics", "cut", None, 0.25)]
    results = {"colour_only": rows}
    assert pages.best_colour_row(results, "means") is rows[0]
    assert pages.best_colour_row(results, "statistics") is rows[1]  # undefined counts as nothing
    rows[3]["classifier"] = "rbf-svm"
    assert pages.best_colour_row(results, "statistics") is rows[3]
    rows[3]["classifier"] = "1-nn"
    rows[3]["val"]["value"] = 0.125
    assert pages.best_colour_row(results, "statistics") is rows[3]
    pages.print_colour(results)
    assert capsys.readouterr().out.splitlines() == [
        ("colour means alone (1-nn, strip included): validation 0.2500 (0.2500–0.7500), test "
         "1.0000 (0.2500–0.7500)"),
        ("colour statistics alone (1-nn, strip cut): validation 0.1250 (0.2500–0.7500), test "
         "0.2500 (0.2500–0.7500)")]


def test_the_table_of_colour_says_on_how_many_images_it_was_fitted():
    rows = [colour("means", "included", None, 1.0), colour("statistics", "cut", 0.5, 0.5)]
    rows[1]["fitted_on"] = 59
    assert pages.colour_table({"colour_only": rows}) == (
        "### What colour alone reaches\n\nNo network: classifiers on whole-image colour, fitted on "
        "58 training images.\n\n| statistics | validation | test |\n| --- | --- | --- |\n"
        "| means, 1-nn, strip included | – | 1.0000 (0.2500–0.7500) |\n"
        "| statistics, 1-nn, strip cut | 0.5000 (0.2500–0.7500) | 0.5000 (0.2500–0.7500) |")


def test_the_table_of_classes_ends_in_malignant_against_benign_where_that_is_known():
    m = {"precision": 0.5, "recall": 0.25, "specificity": 0.75, "f1": 0.125, "auc": None,
         "support": 3}
    test = {"per_class": {"a": m}, "malignant": None, "ece": 0.0625, "brier": 1.5}
    plain = ("### Per class (best)\n\n"
             "| class | precision | recall | specificity | F1 | AUC | support |\n"
             "| --- | --- | --- | --- | --- | --- | --- |\n"
             "| a | 0.5000 | 0.2500 | 0.7500 | 0.1250 | – | 3 |")
    end = "\n\nECE 0.0625, Brier 1.5000."
    assert pages.class_table(test, "best") == plain + end
    test["malignant"] = {"sensitivity": proportion(1.0), "specificity": proportion(0.0)}
    assert pages.class_table(test, "best") == plain + (
        "\n\nMalignant against benign: sensitivity 1.0000 (0.2500–0.7500), specificity 0.0000 "
        "(0.2500–0.7500).") + end


# ---- the page -----------------------------------------------------------------------------------

RUN = {"synthetic": False, "script": "train_x.py", "argv": ["--seed", "1"], "images": 48,
       "data": "here", "git": "abc", "ignored_files": "", "classes": ["Benign", "Early"],
       "fingerprint": "0123456789abcdefGHI", "bad_files": [],
       "machine": {"device": "cpu", "name": "chip", "threads": 2, "torch": "2.1"},
       "arguments": {"split": "random", "split_seed": 42, "table": None, "mu": 0.0, "seed": 0,
                     "skip_bad": False, "weights": None, "resume": True}}


def test_the_head_of_a_page_gives_the_command_and_what_it_cost(tmp_path):
    folder, cost = tmp_path / "name", {"images_seen": 96, "optimizer_steps": 12, "seconds": 3.6}
    text = ("`python train_x.py --seed 1`\n\n48 images of here; 96 training passes in 12 optimiser "
            "steps, 4 s on cpu (chip, 2 threads), torch 2.1, commit abc.")
    assert pages.head(folder, RUN, cost) == "# name\n\n" + text
    spaced = pages.head(folder, RUN | {"argv": ["--out", "a b"]}, cost)
    assert "`python train_x.py --out 'a b'`" in spaced  # as a shell takes it
    drawn = pages.head(folder, RUN | {
        "synthetic": True, "ignored_files": "1 .txt", "bad_files": [["a", "b"]]}, cost)
    assert drawn == ("# name\n\n**SYNTHETIC DATA: drawn, not medical. Figures show that the code "
                     f"works, no more.**\n\n{text} Passed over: 1 .txt. Unreadable and left out: "
                     "1.")


def test_every_figure_stands_on_the_page_and_every_argument_that_is_set(tmp_path):
    for name in ("b.png", "a.png", "c.csv"):
        (tmp_path / name).touch()
    assert pages.figures_and_settings(tmp_path, RUN) == (
        "## Figures\n\n![a](a.png)\n\n![b](b.png)\n\n## Settings\n\n"
        "| argument | value |\n| --- | --- |\n| split | random |\n| split_seed | 42 |\n"
        "| mu | 0.0 |\n| seed | 0 |\n| resume | True |")


@pytest.mark.parametrize(("run", "words"), [
    (RUN, pages.OWN), (RUN | {"synthetic": True}, pages.SYNTHETIC),
    (RUN | {"arguments": RUN["arguments"] | {"table": "t.csv"}}, pages.TABLE),
    *[(RUN | {"classes": ["Benign", "Early", "Pre", "Pro"], "images": n}, words) for n, words in (
        (3256, pages.ALL_SET), (3242, pages.ALL_SET), (3243, pages.OWN), (3257, pages.OWN))],
    (RUN | {"classes": ["Benign", "Early", "Pre"], "images": 3256}, pages.OWN)])
def test_the_model_card_says_what_is_known_of_these_data(tmp_path, run, words):
    """And of no others: the four kinds of data differ in every sentence but one."""
    card = pages.tail(tmp_path, run, 3, 9, "0.1234").partition("## Model card\n\n")[2]
    lines = card.replace("\n  ", " ").splitlines()
    assert lines == [
        "- **Intended use**: research and teaching. Not a medical device; not for diagnosis.",
        (f"- **Data**: here, {run['images']} images, classes {', '.join(run['classes'])}. "
         "Fingerprint `0123456789abcdef`."),
        f"- **Split**: `random`, split seed 42. {words['level']}",
        ("- **Known leaks**: 3 of 9 test images have an identical twin in the training part; "
         f"{words['leaks']}"),
        f"- **Intervals** assume independent images. {words['intervals']}",
        "- **Privacy**: no secure aggregation, no differential privacy: nothing is claimed.",
        ("- **Limits**: one seed unless several are reported; colour alone reaches 0.1234 on the "
         "same test images (table above): a figure not well above it says nothing about cells.")]
    assert ("patient-level split is impossible" in card) == (words is pages.ALL_SET)


def test_what_a_table_knows_of_patients_is_said_beside_what_nobody_knows():
    assert pages.TABLE["leaks"] == pages.OWN["leaks"]
    assert pages.TABLE["level"] == (
        "Where the table names patients or groups, the results say on which sides they stand. "
        "What is not known of the images, such as patients, cannot be kept apart.")




def test_empty_sections_leave_no_gap_and_a_page_ends_in_one_line_end(tmp_path):
    pages.write_page(tmp_path, ["# a", "", "b\n\n"])
    assert (tmp_path / "report.md").read_text("utf-8") == "# a\n\nb\n"
