"""The comparison on run folders made by hand: what it groups, tests, and refuses to test."""

from checks import InputError

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import BASE, script
from matplotlib.colors import to_rgb

import compare
from reporting import figures, metrics
from reporting.terminal import show

CLASSES = ["Benign", "Early"]
LABELS = [0] * 10 + [1] * 30


def make_run(folder, wrong, *, seed=0, first=0, fingerprint="f", part="test", colour=30,
             part_of=None, **arguments):
    """A run folder with 40 test images, `wrong` (positions) of them misclassified. colour: of how
    many colour alone tells the class."""
    folder.mkdir(parents=True)
    p = np.array([[0.8, 0.2] if (y == 0) != (i in wrong) else [0.3, 0.7]
                  for i, y in enumerate(LABELS)])
    m = metrics.measure(np.log(p), np.array(LABELS), CLASSES)
    arguments = {"model": "resnet50", "seed": seed, "lr": 0.1, "split": "random", "remove": [],
                 "table": None, **arguments}
    (folder / "run.json").write_text(json.dumps(
        {"script": "train_federated.py", "part_of": part_of, "seed": seed, "arguments": arguments}))
    rows = [{"features": "means", "strip": "included", "classifier": "1-nn",
               "val": metrics.wilson(0, 0), "test": metrics.wilson(colour, 40)}]
    (folder / "results.json").write_text(json.dumps(
        {"fingerprint": fingerprint, "model": arguments["model"], "images_seen": 100 + seed,
         "seconds": 2.0, "best": {"test": m}, "colour_only": rows}))
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "prediction", "p_Benign", "p_Early"])
        writer.writerow(["val.png", "Early", "val", "Benign", 0.9, 0.1])
        for i, y in enumerate(LABELS):
            writer.writerow([f"{first + i:03d}.png", CLASSES[y], part,
                             CLASSES[int(p[i].argmax())], *p[i]])
    return folder


def run(capsys, tmp_path, *folders):
    compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    return (capsys.readouterr().out,
            json.loads((tmp_path / "out" / "comparison.json").read_text()))


def test_two_runs_on_the_same_images(tmp_path, capsys):
    a = make_run(tmp_path / "a", {0, 1})
    b = make_run(tmp_path / "b", {1, 2, 3, 4, 5, 6, 7, 8}, lr=0.2)
    text, found = run(capsys, tmp_path, a, b)
    assert found["rows"]["a"]["accuracy"] == metrics.wilson(38, 40)
    # 10 Benign, two of them called Early, and 30 Early
    macro = "0.9688 / 0.9000 / 0.9283"  # (1 + 30/32) / 2, (0.8 + 1) / 2, (16/18 + 60/62) / 2
    weighted = "0.9531 / 0.9500 / 0.9480"  # the same, a quarter and three quarters
    kappa = show((0.95 - (10 * 8 + 30 * 32) / 1600) / (1 - (10 * 8 + 30 * 32) / 1600))
    assert (f"\n| a | 1 | 40 | 0.9500 (0.8350–0.9862) | {macro} | {weighted} | {kappa} | 0.9000 | "
            "100 | 2 |\n") in text
    assert found["rows"]["b"]["macro_recall"] == pytest.approx((2 / 10 + 1) / 2)
    assert found["rows"]["b"]["weighted_recall"] == pytest.approx(0.8)
    (t,) = found["tests"]
    # a alone is right on 2..8, b alone on 0
    assert t["mcnemar"] == [{"seed": 0, "a_only": 7, "b_only": 1,
                             "p": pytest.approx(2 * (1 + 8) / 2**8)}]
    assert t["difference"]["value"] == pytest.approx(0.15) and t["difference"]["low"] > 0
    assert "| 7 : 1 | 0.07 |" in text and "Not tested" not in text
    assert text.count("no network: means, 1-nn, strip included | – | 40 | 0.7500") == 1
    assert "Table 4" not in text
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    assert (tmp_path / "out" / "comparison.md").read_text().startswith("# Comparison")


def test_seeds_of_one_configuration_are_one_row(tmp_path, capsys):
    a = [make_run(tmp_path / f"a-seed{s}", set(range(s)), seed=s) for s in (1, 2, 3)]
    b = [make_run(tmp_path / "b" / f"seed{s}", {5}, seed=s, lr=0.2) for s in (2, 3)]
    text, found = run(capsys, tmp_path, *a, *b)
    row = found["rows"]["a"]
    assert row["runs"] == 3 and row["seeds"] == [1, 2, 3] and row["images_seen"] == 102
    assert row["accuracy"] == {"n": 3, "mean": pytest.approx(38 / 40), "sd": pytest.approx(1 / 40)}
    assert "| a | 3 | 40 | 0.9500 ± 0.0250 |" in text and found["rows"]["b"]["runs"] == 2
    (t,) = found["tests"]
    assert t["difference"]["value"] == pytest.approx(38 / 40 - 39 / 40)
    assert [(m["seed"], m["a_only"], m["b_only"]) for m in t["mcnemar"]] == [(2, 1, 2), (3, 1, 3)]
    assert t["mcnemar"][0]["p"] == 1.0 and t["mcnemar"][1]["p"] == pytest.approx(10 / 16)


def test_the_same_run_twice_is_two_rows_and_an_other_model_is_no_seed(tmp_path, capsys):
    folders = [make_run(tmp_path / "x" / "r", {1}), make_run(tmp_path / "y" / "r", {1}),
               make_run(tmp_path / "z", {1}, seed=1, model="vgg16")]
    _, found = run(capsys, tmp_path, *folders)
    assert {name: row["runs"] for name, row in found["rows"].items() if "network" not in name} == {
        str(folders[0]): 1, str(folders[1]): 1, "z": 1}


def test_a_run_of_clients_alone_stands_for_each_of_them(tmp_path):
    whole = make_run(tmp_path / "x-seeds0-2", {0}, local_only=True)
    results = json.loads((whole / "results.json").read_text())
    results["members"] = [{"name": name, "train": 9} for name in ("client0", "client1")]
    for name in ("client0", "client1"):
        make_run(whole / name, {1}, part_of="x", local_only=True)
        (whole / name / "split.csv").write_text("path,split\nx,train\n")
    (whole / "results.json").write_text(json.dumps(results))
    (pooled,) = compare.load(whole)  # with test parts of their own: pooled, as folds are
    assert (pooled.label, pooled.site) == ("x", "")
    del results["best"]
    (whole / "results.json").write_text(json.dumps(results))
    several = compare.load(whole)
    assert [r.site for r in several] == ["client0", "client1"]
    assert {r.label for r in several} == {"x, one client alone"}
    ((label, members),) = compare.group(several).items()  # one configuration, one row
    assert (label, len(members)) == ("x, one client alone", 2)
    # of hospitals that own other images, none joins that row, whatever its seed
    other = shutil.copytree(whole, tmp_path / "other")
    (other / "client0" / "split.csv").write_text("path,split\ny,train\n")
    assert [len(m) for m in compare.group([*several, *compare.load(other)]).values()] == [2, 2]
    third = results["members"] + [{"name": "client2", "train": 9}]  # of the same images, the third
    make_run(other / "client2", {1}, part_of="x", local_only=True)
    for name in ("client0", "client2"):
        (other / name / "split.csv").write_text("path,split\nx,train\n")
    (other / "results.json").write_text(json.dumps(results | {"members": third}))
    assert [len(m) for m in compare.group([*several, *compare.load(other)]).values()] == [2, 3]


def test_colour_alone_is_one_row_for_each_training_and_test_part(tmp_path):
    folders = [make_run(tmp_path / "a-seed1", {0}, seed=1),
               make_run(tmp_path / "a-seed2", {0}, seed=2, colour=20),
               make_run(tmp_path / "b", {0}, lr=0.2), make_run(tmp_path / "c", {0}, lr=0.3)]
    groups = compare.group(r for folder in folders for r in compare.load(folder))
    name = "no network: means, 1-nn, strip included"
    rows = compare.colour_rows(groups)
    assert rows == {name: {"n": 40, "accuracy": metrics.mean_sd([0.75, 0.5])},
                    f"{name} (b)": {"n": 40, "accuracy": metrics.wilson(30, 40)}}


def test_refuses_in_words_where_the_test_images_differ(tmp_path, capsys):
    a = make_run(tmp_path / "a", {0})
    b = make_run(tmp_path / "b", {0}, first=10, lr=0.2)
    c = make_run(tmp_path / "c", {0}, lr=0.3, fingerprint="g")
    text, found = run(capsys, tmp_path, a, b, c)
    assert all("refused" in t and "mcnemar" not in t for t in found["tests"])
    assert "a against b: 40 and 40 test images, 30 of them in common: not the same images, so " \
        "no paired test" in text
    assert "a against c: 40 and 40 test images, another data set" in text
    assert "McNemar" not in text


def test_of_patients_that_are_known_there_is_an_interval_and_no_mcnemar_test(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", set()), make_run(tmp_path / "b", set(range(12)), lr=0.2)
    (b / "split.csv").write_text("path,label,split,client,patient\n" + "".join(
        f"{i:03d}.png,Early,test,,P{max(i, 1):02d}\n" for i in range(40)))  # the first has two
    text, found = run(capsys, tmp_path, a, b)
    (t,) = found["tests"]
    assert (t["n"], t["unit"], t["units"], t["mcnemar"]) == (40, "patient", 39, [])
    members = np.array([max(i, 1) for i in range(40)])
    d = metrics.paired_difference(np.ones(40), np.arange(40) >= 12, members, "patient")
    assert t["difference"] == d and d["low"] < 0.3 < d["high"]
    assert (f"\n| a | b | 40, 39 patients | +0.3000 ({d['low']:+.4f} … {d['high']:+.4f}) | – | "
            "images of a patient are alike |") in text


def test_a_row_of_paired_tests_shows_up_to_four_p_values_and_else_their_range():
    def row(p, unit="image", reason=None):
        pair = {"a": "A", "b": "B", "n": 9, "unit": unit, "units": 4, "difference": {
            "value": -0.25, "low": -0.5, "high": 0.0, "reason": reason}}
        pair["mcnemar"] = [{"seed": i, "a_only": i + 1, "b_only": 2, "p": x}
                           for i, x in enumerate(p)]
        ((a, b, *rest),) = compare.test_rows([{"a": "A", "b": "C", "refused": "no"}, pair])
        assert (a, b) == ("A", "B")
        return rest
    assert row([0.1234]) == ["9", "-0.2500 (-0.5000 … +0.0000)", "1 : 2", "0.12"]
    assert row([0.5, 0.001, 1.0, 0.25])[2:] == ["10 : 8", "0.5, 0.001, 1, 0.25"]
    assert row([0.5, 0.001, 1.0, 0.25, 0.75])[2:] == ["15 : 10", "0.001–1 (5 pairs)"]
    assert row([], reason="too few") == ["9", "-0.2500 (too few)", "–", "no common seed"]
    assert row([], "group")[::3] == ["9, 4 groups", "images of a group are alike"]


def test_pooled_folds_compare_with_pooled_folds(tmp_path, capsys):
    a = make_run(tmp_path / "a", {0}, part="fold2")
    b = make_run(tmp_path / "b", {0, 1}, part="fold1", lr=0.2)
    results = json.loads((a / "results.json").read_text())
    (a / "results.json").write_text(json.dumps(results | {"members": [{"name": "fold2"}]}))
    _, found = run(capsys, tmp_path, a, b)
    assert found["tests"][0]["n"] == 40
    assert found["tests"][0]["mcnemar"][0]["a_only"] == 1


def test_the_papers_table_4_with_the_intervals_its_test_sizes_imply(tmp_path, capsys):
    text, found = run(capsys, tmp_path, make_run(tmp_path / "a", {0}), "--paper")
    for name, value, low, high in (
            ("FedAvg + ResNet50, 323/325", 0.9938, 0.9778, 0.9983),
            ("ResNet50 (centralised), 641/652", 0.9831, 0.9700, 0.9906),
            ("VGG16, 635/652", 0.9739, 0.9586, 0.9837),
            ("EfficientNet-B0, 628/652", 0.9632, 0.9458, 0.9751)):
        row = found["rows"][f"paper: {name}"]["accuracy"]
        assert [round(row[k], 4) for k in ("value", "low", "high")] == [value, low, high]
    rest = "– | – | – | – |\n"  # of the others no AUC is published; of none κ or cost
    assert "| – | 325 | 0.9938 (0.9778–0.9983) | – | 0.9939 / 0.9938 / 0.9938 | – | 0.9999 | – |" \
        " – |\n" in text
    for hits, average in ((641, "0.9800"), (635, "0.9700"), (628, "0.9600")):
        (line,) = (x for x in text.splitlines(True) if f", {hits}/652 | – | 652 | " in x)
        assert line.endswith(f") | – | {average} / {average} / {average} | {rest}")
    assert "Paper: Table 4, its averages unlabelled" in text
    assert "publishes no predictions: no paired test" in text


# ---- figures ------------------------------------------------------------------------------------

def write_history(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(
        {"images": n, "val_loss": loss, "val_accuracy": accuracy}) + "\n"
        for n, loss, accuracy in lines))
    return SimpleNamespace(folder=folder)


def test_curves_are_over_the_images_passed_and_of_folds_a_mean_as_far_as_all_went(tmp_path):
    one = write_history(tmp_path / "one", (10, None, None), (10, 2.0, 0.5), (5, 0.0, 0.0))
    assert {k: v.tolist() for k, v in compare.curves(one).items()} == {
        "images": [20, 25], "loss": [2.0, 0.0], "accuracy": [0.5, 0.0]}
    write_history(tmp_path / "two" / "fold1", (10, 2.0, 0.5), (10, 1.0, 0.75))
    write_history(tmp_path / "two" / "fold2", (14, 4.0, 0.25))
    two = compare.curves(SimpleNamespace(folder=tmp_path / "two"))
    assert {k: v.tolist() for k, v in two.items()} == {
        "images": [12], "loss": [3.0], "accuracy": [0.375]}
    never = compare.curves(write_history(tmp_path / "never", (10, None, None)))
    assert {k: len(v) for k, v in never.items()} == {"images": 0, "loss": 0, "accuracy": 0}
    hospital = compare.curves(SimpleNamespace(folder=tmp_path / "absent"))  # the server has it
    assert {k: len(v) for k, v in hospital.items()} == {"images": 0, "loss": 0, "accuracy": 0}


@pytest.fixture
def saved(monkeypatch):
    """The figures that would have been written."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path, dpi: kept.append(figure))
    return kept


def test_the_curves_of_a_group_have_one_colour_and_one_entry_in_the_legend(tmp_path, saved):
    runs = [write_history(tmp_path / str(i), (10, 1.0 + i, 0.5), (10, 0.5, 0.25 * i))
            for i in range(3)]
    compare.plot_curves({"a": runs[:2], "b": runs[2:]}, tmp_path / "x.png")
    accuracy, loss = saved[0].axes
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [
        [[10, 0.5], [20, 0.0]], [[10, 0.5], [20, 0.25]], [[10, 0.5], [20, 0.5]]]
    assert [line.get_ydata().tolist() for line in loss.lines] == [[1, 0.5], [2, 0.5], [3, 0.5]]
    colours = [to_rgb(line.get_color()) for line in accuracy.lines]
    assert colours[0] == colours[1] != colours[2]
    assert colours == [to_rgb(line.get_color()) for line in loss.lines]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["a", "b"]
    assert [axis.get_ylabel() for axis in (accuracy, loss)] == [
        "validation accuracy", "validation loss"]


def test_a_run_may_be_called_paper_and_has_its_place_in_the_figure(tmp_path, capsys):
    a, b = make_run(tmp_path / "paper-a", {0}), make_run(tmp_path / "no network b", {1}, lr=0.2)
    text, found = run(capsys, tmp_path, a, b)
    assert list(found["rows"])[:2] == ["paper-a", "no network b"] and "Table 4" not in text


def test_the_figure_of_accuracies_has_rows_for_networks_and_a_line_for_colour(tmp_path, saved):
    def ran(accuracy):
        return SimpleNamespace(results={"best": {"test": {"accuracy": {"value": accuracy}}}})
    rows = {"a": {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}},
            "no network b": {"accuracy": {"value": None, "low": None, "high": None}},
            "b": {"accuracy": {"mean": 0.5, "sd": 0.25, "n": 2}},
            "paper": {"accuracy": {"value": 0.0, "low": 0.0, "high": 0.5}},
            "no network: means": {"accuracy": {"mean": 0.125, "sd": 0.0, "n": 2}},
            "no network: worse": {"accuracy": {"value": 0.0, "low": 0.0, "high": 0.5}},
            "no network: one class": {"accuracy": {"mean": None, "sd": None, "n": 0}}}
    compare.plot(rows, {"a": [ran(0.5)], "b": [ran(0.25), ran(0.75)]}, tmp_path / "x.png")
    (axis,) = saved[0].axes
    drawn = [(line.get_xydata().tolist(), line.get_color()) for line in axis.lines]
    assert drawn == [
        ([[0.25, 0], [0.75, 0]], "tab:blue"), ([[0.5, 0]], "tab:blue"),
        ([[0.25, 2], [0.75, 2]], "tab:blue"), ([[0.5, 2]], "tab:blue"),
        ([[0.0, 3], [0.5, 3]], "grey"), ([[0.0, 3]], "grey"),
        ([[0.125, 0], [0.125, 1]], "grey")]  # from the bottom to the top of the figure
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "a (0.5000 (0.2500–0.7500))", "no network b (–)", "b (0.5000 ± 0.2500)",
        "paper (0.0000 (0.0000–0.5000))"]
    assert axis.get_xlabel().endswith(
        "\ndashed, the best of 2 on these images: no network: means (0.1250 ± 0.0000)")
    assert axis.yaxis_inverted()  # in the order of the table


# ---- errors and the script ----------------------------------------------------------------------

def test_what_cannot_be_compared_is_one_line(tmp_path):
    good = make_run(tmp_path / "good", {0})
    bare = make_run(tmp_path / "bare", {0})
    (bare / "predictions.csv").unlink()
    unfinished = make_run(tmp_path / "unfinished", {0})
    (unfinished / "results.json").unlink()
    broken = make_run(tmp_path / "broken", {0})
    (broken / "predictions.csv").write_text("path,label\nx,y\n")
    (tmp_path / "empty").mkdir()
    for folder, words in ((bare, "has no predictions.csv; is the run complete?"),
                          (unfinished, "not complete: it has no results.json"),
                          (broken, "damaged"), (tmp_path / "empty", "not a run folder"),
                          (tmp_path / "absent", "not a run folder")):
        with pytest.raises(InputError, match=words):
            compare.main([str(good), str(folder), "--out", str(tmp_path / "never")])
    with pytest.raises(InputError, match="exists already"):
        compare.main([str(good), "--out", str(tmp_path / "empty")])
    assert not (tmp_path / "never").exists()
    done = script(tmp_path / "absent", name="compare.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_script_on_real_runs(tree, tmp_path):
    for model in ("toynet", "mobilenet_v3_small"):
        done = script("--data", tree, *BASE, "--rounds", 1, "--model", model, "--out",
                      tmp_path / model)
        assert done.returncode == 0, done.stderr
    done = script(tmp_path / "toynet", tmp_path / "mobilenet_v3_small",
                  name="compare.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| toynet | mobilenet_v3_small | 7 | " in done.stdout
    assert (tmp_path / "runs" / "comparison" / "comparison.md").exists()
