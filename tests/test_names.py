"""Names that users really have, and files that are never destroyed."""

from checks import InputError

import json
import threading
import warnings

import numpy as np
import pytest
from helpers import train, write_tree

import predict
from dataset.files import CLASSES
from reporting import figures, metrics, pages, run_folder


@pytest.fixture
def run(short):
    return short


# ---- names are text -----------------------------------------------------------------------------

NAMES = ["a$_{$", "US$ 5 or 6$", "a|b", "早期", "x" * 200]


def test_a_run_with_any_class_names_ends_well(tmp_path, capsys):
    root = write_tree(tmp_path / "set", dict.fromkeys(NAMES, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's, one for each letter
        out = train(root, tmp_path / "run", "--rounds", 1)
    assert (out / "confusion.png").exists() and (out / "results.json").exists()
    error = capsys.readouterr().err
    assert error.count("lacks letters") <= 1
    table = (out / "report.md").read_text().partition("### Per class")[2].partition("\n\n###")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(NAMES)
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
    predict.main([str(out), str(root), "--exact"])
    assert json.loads((out / "predicted.json").read_text())["n"] == 12 * len(NAMES)


def test_markdown_cells_stay_cells():
    text = pages.markdown(["a|b"], [["x\ny"], ["p||q"]])
    assert text.splitlines() == ["| a\\|b |", "| --- |", "| x y |", "| p\\|\\|q |"]


@pytest.mark.parametrize("name", ["$\\frac{$", "a_b^c", "$x$"])
def test_dollars_are_no_mathematics(tmp_path, name):
    figures.plot_confusion([[1, 0], [0, 1]], [name, "b"], name, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_letters_that_the_font_lacks_are_one_line(tmp_path, capsys):
    figures.say_missing.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(2):
            figures.plot_confusion([[1, 0], [0, 1]], ["早期", "中"], "x", tmp_path / f"{k}.png")
    assert capsys.readouterr().err.count("lacks letters") == 1


def test_names_that_differ_by_case_are_met_exactly(tmp_path):
    names = predict.read_map(None, ["A", "a", "B"])
    for folder, label in (("A", "A"), ("a", "a"), ("B", "B"), ("b", "")):
        file = tmp_path / folder / "1.png"
        assert predict.label_of(file, tmp_path, names) == label
    usual = predict.read_map(None, ["Benign", "Other"])
    assert predict.label_of(tmp_path / "OTHER" / "1.png", tmp_path, usual) == "Other"


# ---- what is said of which data -----------------------------------------------------------------

@pytest.mark.parametrize(("classes", "known"), [
    (list(CLASSES), True), (["Benign", "Malignant"], True), (["Benign", "Early", "Pre"], True),
    ([*CLASSES, "Malignant"], True), (["Early", "Pre"], False),
    (["Benign", "InSitu", "Invasive", "Normal"], False), (["Benign", "Normal"], False)])
def test_malignant_against_benign_only_where_all_others_are_malignant(classes, known):
    found = metrics.malignant(np.eye(len(classes), dtype=int), classes)
    assert (found is not None) == known


def test_facts_of_the_all_set_stay_with_the_all_set(run):
    page = (run / "report.md").read_text()
    assert "89 patients" not in page and "public ALL set" not in page


# ---- what is there stays there ------------------------------------------------------------------

@pytest.mark.parametrize(("out", "words"), [
    ("results.csv", "results.json exists already"), ("run.json", "exists already"),
    ("new.json", "must not end in .json"), ("split.csv", "split.csv exists already"),
    ("new/x.csv", "there is no folder")])
def test_predict_never_writes_over_what_is_there(run, tree, out, words):
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(InputError, match=words):
        predict.main([str(run), str(tree), "--out", str(run / out)])
    assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}


def test_two_at_once_never_take_one_name(tmp_path):
    taken, gate = [], threading.Barrier(8)

    def take():
        gate.wait()
        with predict.reserved(None, tmp_path / "predicted.csv", ".json") as path:
            taken.append(path.name)
            path.write_text("x")
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(["predicted.csv", *(f"predicted-{n}.csv" for n in range(2, 9))])


def test_a_name_is_free_again_when_the_work_fails(tmp_path):
    with (pytest.raises(KeyboardInterrupt),
          predict.reserved(None, tmp_path / "a.csv", ".json") as path):
        assert path.exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with (pytest.raises(KeyboardInterrupt),  # also where somebody else has removed it
          predict.reserved(None, tmp_path / "a.csv", ".json") as path):
        path.unlink()
        raise KeyboardInterrupt


def test_a_name_is_taken_where_its_companion_is(tmp_path):
    (tmp_path / "a.json").touch()
    (tmp_path / "a-2.csv").touch()
    with predict.reserved(None, tmp_path / "a.csv", ".json") as path:
        assert path == tmp_path / "a-3.csv"
    with pytest.raises(InputError, match=r"a.json exists already"), predict.reserved(
            str(tmp_path / "a.csv"), tmp_path / "x.csv", ".json"):
        pass
    with predict.reserved(str(tmp_path / "b.csv"), tmp_path / "x.csv", ".json") as path:
        assert path == tmp_path / "b.csv" and path.exists()


@pytest.mark.parametrize("link", ["runs", "runs/name"])
def test_a_broken_link_in_the_way_is_one_line_and_no_endless_count(tmp_path, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "unmounted")
    with (pytest.raises(InputError, match="broken link"),
          run_folder.made(None, "runs/name")):
        pass


def test_a_report_that_fails_is_one_line_and_the_result_is_on_disk(tree, tmp_path, monkeypatch,
                                                                   capsys):
    def fails(*args):
        raise RuntimeError("no font at all")
    monkeypatch.setattr(figures, "plot_confusion", fails)
    out = train(tree, tmp_path / "run", "--rounds", 1)
    assert json.loads((out / "results.json").read_text())["best"]["test"]["n"] == 7
    error = capsys.readouterr().err
    assert "the report is not complete (RuntimeError: no font at all)" in error
    assert error.count("\n") == 1
