"""The comparison on run folders made by hand: what it groups, tests, and refuses to test."""

from checks import InputError

import csv
import json

import numpy as np
import pytest
from helpers import BASE, script

import compare
from reporting import metrics

CLASSES = ["Benign", "Early"]
LABELS = [0] * 10 + [1] * 30


def make_run(folder, wrong, *, seed=0, first=0, fingerprint="f", part="test", **arguments):
    """A run folder with 40 test images, `wrong` (positions) of them misclassified."""
    folder.mkdir(parents=True)
    p = np.array([[0.8, 0.2] if (y == 0) != (i in wrong) else [0.3, 0.7]
                  for i, y in enumerate(LABELS)])
    m = metrics.measure(np.log(p), np.array(LABELS), CLASSES)
    arguments = {"model": "resnet50", "seed": seed, "lr": 0.1, "split": "random", **arguments}
    (folder / "run.json").write_text(json.dumps(
        {"script": "train_federated.py", "part_of": None, "seed": seed, "arguments": arguments}))
    colour = [{"features": "means", "strip": "included", "classifier": "1-nn",
               "val": metrics.wilson(0, 0), "test": metrics.wilson(30, 40)}]
    (folder / "results.json").write_text(json.dumps(
        {"fingerprint": fingerprint, "model": arguments["model"], "images_seen": 100 + seed,
         "seconds": 2.0, "best": {"test": m}, "colour_only": colour}))
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
    assert "| a | 1 | 40 | 0.9500 (0.8350–0.9862) | " in text
    assert found["rows"]["b"]["macro_recall"] == pytest.approx((2 / 10 + 1) / 2)
    assert found["rows"]["b"]["weighted_recall"] == pytest.approx(0.8)
    (t,) = found["tests"]
    # a alone is right on 2..8, b alone on 0
    assert t["mcnemar"] == [{"seed": 0, "a_only": 7, "b_only": 1,
                             "p": pytest.approx(2 * (1 + 8) / 2**8)}]
    assert t["difference"]["value"] == pytest.approx(0.15) and t["difference"]["low"] > 0
    assert "| 7 : 1 | 0.07 |" in text and "Not tested" not in text
    assert text.count("no network: means, 1-nn, strip included | – | 40 | 0.7500") == 1
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    assert (tmp_path / "out" / "comparison.md").read_text().startswith("# Comparison")


def test_seeds_of_one_configuration_are_one_row(tmp_path, capsys):
    a = [make_run(tmp_path / f"a-seed{s}", set(range(s)), seed=s) for s in (1, 2, 3)]
    b = [make_run(tmp_path / "b" / f"seed{s}", {5}, seed=s, lr=0.2) for s in (2, 3)]
    text, found = run(capsys, tmp_path, *a, *b)
    row = found["rows"]["a"]
    assert row["runs"] == 3 and row["seeds"] == [1, 2, 3] and row["images_seen"] == 102
    assert row["accuracy"] == {"n": 3, "mean": pytest.approx(38 / 40), "sd": pytest.approx(1 / 40)}
    assert "| a | 3 | 40 | 0.9500 ± 0.0250 |" in text
    (t,) = found["tests"]
    assert t["difference"]["value"] == pytest.approx(38 / 40 - 39 / 40)
    assert [(m["seed"], m["a_only"], m["b_only"]) for m in t["mcnemar"]] == [(2, 1, 2), (3, 1, 3)]
    assert t["mcnemar"][0]["p"] == 1.0 and t["mcnemar"][1]["p"] == pytest.approx(10 / 16)


def test_a_folder_of_several_runs_names_them(tmp_path):
    """Older versions made such folders (--seeds, --models)."""
    parent = tmp_path / "many"
    for s in (0, 1):
        make_run(parent / f"seed{s}", {s}, seed=s)
    (parent / "run.json").write_text(json.dumps(
        {"script": "x", "seed": 0, "arguments": {"seeds": [0, 1]}}))
    with pytest.raises(InputError, match="several runs, name them: .*many/seed0 .*many/seed1"):
        compare.main([str(parent)])


def test_the_same_run_twice_is_two_rows_and_an_other_model_is_no_seed(tmp_path, capsys):
    folders = [make_run(tmp_path / "x" / "r", {1}), make_run(tmp_path / "y" / "r", {1}),
               make_run(tmp_path / "z", {1}, seed=1, model="vgg16")]
    _, found = run(capsys, tmp_path, *folders)
    assert [row["runs"] for name, row in found["rows"].items() if "network" not in name] == [1] * 3


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


def test_pooled_folds_compare_with_pooled_folds(tmp_path, capsys):
    a = make_run(tmp_path / "a", {0}, part="fold2")
    b = make_run(tmp_path / "b", {0, 1}, part="fold1", lr=0.2)
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
    assert "0.9939 / 0.9938 / 0.9938" in text
    assert "publishes no predictions: no paired test" in text


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
                          (unfinished, "not complete, it has no results.json"),
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
