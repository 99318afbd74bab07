"""explain.py on a real small run: what it writes, that it repeats, and what it refuses."""

import checks

import argparse
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import script, train

import explain
import models
from dataset import interventions
from reporting import figures, finished, inference

QUICK = ["--per-class", "1", "--samples", "20", "--steps", "3", "--lime-seeds", "2"]


@pytest.fixture(scope="module")
def explained(tree, tmp_path_factory):
    """A run at 28 pixels, explained by the real command."""
    out = tmp_path_factory.mktemp("explain") / "run"
    train(tree, out, "--image-size", 28, "--rounds", 1)
    state = models.read_file(out / "model.pt")["state"]
    done = script(out, *QUICK, name="explain.py")
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(v, models.read_file(out / "model.pt")["state"][k])
               for k, v in state.items())
    return out, done


def table(folder, name="explanations"):
    return list(csv.DictReader((folder / name / "explanations.csv").open()))


def test_what_is_written(explained):
    out, done = explained
    names = {p.name for p in (out / "explanations").iterdir()}
    assert names >= {"report.md", "explanations.csv", "explanations.json", "maps",
                     "lime-for-and-against.png", *(f"{m}-1.png" for m in explain.METHODS)}
    rows = table(out)
    for row in rows:
        values = np.load(out / "explanations" / row["map"])
        assert values.shape == (28, 28) and values.dtype == np.float32
        top = np.percentile(np.abs(values), 99) or np.abs(values).max() or 1
        assert float(row["scale"]) == pytest.approx(top, rel=1e-4)
    for method in explain.METHODS:
        assert (out / "explanations" / f"{method}-1.png").stat().st_size > 3000
        assert method in done.stdout
    report = (out / "report.md").read_text()
    assert report.count("## Explanations") == 1 and "random − deletion area" in report
    assert "Model card" in report  # what was there stays


def test_images_are_chosen_by_rule_and_every_error_is_among_them(explained):
    out, _ = explained
    test = finished.read_predictions(out)
    rows = table(out)
    wrong = {p for p, y, x in zip(test.paths, test.labels, test.logits, strict=True)
             if x.argmax() != y}
    assert wrong <= {r["path"] for r in rows} and wrong
    ruled = {r["path"] for r in rows if r["chosen"] == "rule"}
    assert sorted(p.split("/")[0] for p in ruled) == ["Benign", "Early", "Pre"]
    for row in rows:  # the predicted class, and the true one where it differs
        explained_classes = {r["class"] for r in rows if r["path"] == row["path"]}
        assert explained_classes == {row["prediction"], row["truth"]}


def test_the_rule_is_evenly_spaced_in_path_order():
    n = 10
    test = finished.Predictions([f"a{i}" for i in range(n)] + ["b0"], np.array([0] * n + [1]),
                            np.array([[1.0, 0]] * n + [[0, 1.0]]), ["a", "b"])
    assert explain.choose(test, 2) == {"a2": "rule", "a7": "rule", "b0": "rule"}
    assert list(explain.choose(test, 10)) == [*test.paths]
    test.logits[4] = [0, 1]
    assert explain.choose(test, 1) == {"a5": "rule", "b0": "rule", "a4": "misclassified"}


def test_the_explained_function_is_the_evaluated_one(explained, tree):
    """Its probabilities are those of predictions.csv, image by image."""
    out, done = explained
    assert "WARNING" not in done.stderr
    trained = inference.load(out, torch.device("cpu"))
    test = finished.read_predictions(out)
    for subject in explain.of_the_run(out, trained, 3):
        written = np.exp(test.logits[test.paths.index(subject.path)])
        assert subject.p == pytest.approx(written, abs=1e-5)
        again = inference.probabilities(trained, subject.pixels[None])[0]
        assert again == pytest.approx(written, abs=1e-5)


def test_another_network_in_its_place_is_noticed(explained, tmp_path, capsys):
    out = tmp_path / "changed"
    shutil.copytree(explained[0], out)
    content = models.read_file(out / "model.pt")
    content["state"]["fc.weight"] += 1 * torch.randn_like(content["state"]["fc.weight"])
    models.save(content, out / "model.pt")
    explain.of_the_run(out, inference.load(out, torch.device("cpu")), 1)
    assert "not the network that was evaluated" in capsys.readouterr().err


def test_twice_is_the_same_to_the_byte(explained):
    out, _ = explained
    before = {p.name: p.read_bytes() for p in (out / "explanations").rglob("*")
              if p.suffix in (".npy", ".csv", ".json", ".md")}
    explain.main([str(out), *QUICK])
    after = {p.name: p.read_bytes() for p in (out / "explanations").rglob("*")
             if p.suffix in (".npy", ".csv", ".json", ".md")}
    assert before == after and len(before) > 10


def test_a_correlation_that_may_be_one_half_is_not_called_sensitive():
    check = {method: {"random_area": 0.5, "deletion_area": 0.5, "corner": 0.0, "background": 0.0,
                      "jaccard": 1.0} for method in explain.METHODS}
    one = explain.Subject("x", torch.zeros(3, 8, 8, dtype=torch.uint8), 0, np.ones(1), "rule")
    for rho, sensitive in ((0.5, False), (0.25, True)):
        found = explain.verdicts([check] * 2, {m: [[rho, rho]] for m in explain.METHODS}, [one],
                                 argparse.Namespace(rectangle=(0.7, 0.85, 1.0, 1.0)))
        assert {(m["sensitive"], m["faithful"]) for m in found["methods"].values()} == {
            (sensitive, False)}  # and a gain of 0 is not called faithful


def test_verdicts_say_what_the_figures_say(explained):
    found = json.loads((explained[0] / "explanations" / "explanations.json").read_text())
    assert found["images"] == 3 and set(found["methods"]) == set(explain.METHODS)
    rows = [r for r in table(explained[0]) if r["chosen"] == "rule" and r["deletion_area"]]
    for method, m in found["methods"].items():
        gains = [float(r["random_area"]) - float(r["deletion_area"]) for r in rows
                 if r["method"] == method]
        assert m["deletion_gain"]["n"] == len(gains) == 3
        assert m["deletion_gain"]["value"] == pytest.approx(np.mean(gains), abs=1e-5)
        assert m["faithful"] == (m["deletion_gain"]["low"] > 0)
        assert m["sensitive"] == (m["rank_correlation"][-1]["high"] < 0.5)
        assert len(m["rank_correlation"]) == len(explain.STAGES)
    assert found["methods"]["lime"]["jaccard"]["n"] == 3
    assert found["methods"]["lime"]["rank_correlation"][0]["n"] == 0  # the last stage alone


def test_other_images_by_name(explained, tree, capsys):
    files = sorted((tree / "Pre").iterdir())[:2]
    explain.main([str(explained[0]), *QUICK, "--images", *map(str, files)])
    latest = max(explained[0].glob("explanations*"), key=lambda p: p.stat().st_mtime_ns)
    assert latest.name != "explanations"  # the first ones stay
    rows = table(explained[0], latest.name)
    assert {r["path"] for r in rows} == set(map(str, files))
    assert {r["chosen"] for r in rows} == {"given"} and {r["truth"] for r in rows} == {""}


def test_a_client_of_fedbn_is_named(tree, tmp_path):
    out = train(tree, tmp_path / "bn", "--bn", "local", "--clients", 2, "--rounds", 1)
    with pytest.raises(checks.InputError, match=r"--client must be one of \[0, 1\]"):
        inference.load(out, torch.device("cpu"))
    one, two = (inference.load(out, torch.device("cpu"), k).model.state_dict() for k in (0, 1))
    assert any(not torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("line,words", [
    ("absent", "it is no trained run"), ("RUN --layer layer9", "no such module"),
    ("RUN --layer fc", "no feature map"), ("RUN --images absent.png", "--images absent.png"),
    ("RUN --client 0", "--client has no place here"), ("RUN --per-class 0", "argument --per-class"),
    ("RUN --samples 3", "argument --samples"), ("RUN --lime-seeds 1", "argument --lime-seeds"),
    ("RUN --rectangle 0 0 2 1", "argument --rectangle"),
    ("RUN --rectangle 0.5 0 0.2 1", "left < right"), ("RUN --device cuda:7", "not there")])
def test_bad_input_is_one_line(explained, capsys, line, words):
    argv = line.replace("RUN", str(explained[0])).split()
    with pytest.raises(SystemExit) as stop:
        checks.guard(lambda: explain.main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error
    assert error.strip().count("\n") == 0 and "Traceback" not in error


def test_defaults_of_the_flags():
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    args = parser.parse_args(["run"])
    assert (args.per_class, args.steps, args.samples, args.lime_seeds, args.rectangle) == (
        3, 32, 1000, 3, (0.7, 0.85, 1.0, 1.0))


def test_the_background_is_bright_to_the_eye():
    """By luminance: green of 150 is brighter than red of 255."""
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    pixels[0, 0, 0], pixels[1, 0, 1] = 255, 150
    assert interventions.background(pixels).tolist() == [[False, True], [False, False]]
    pixels[0, 0, 0], pixels[1, 0, 1], pixels[2, 1, 0] = 100, 50, 255  # 29.9, 29.35 and 29.07
    assert interventions.background(pixels).tolist() == [[True, False], [False, False]]
    assert interventions.background(torch.full((3, 2, 2), 7)).all()  # ties are in it


def test_the_first_benign_and_the_first_malignant_image_are_shown(monkeypatch, tmp_path):
    """Of images without a known class, by the class that the network names first."""
    shown, found = [], {"maps": {}, "segments": "s", "lime": [{0: "w0", 1: "w1"}]}
    monkeypatch.setattr(figures, "plot_lime", lambda entries, classes, path: shown.extend(entries))
    monkeypatch.setattr(figures, "plot_maps", lambda *a: None)
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    subjects = [explain.Subject(n, pixels, None, np.array(p), "given")
                for n, p in (("benign", [0.9, 0.1]), ("malignant", [0.2, 0.8]))]
    figures.write(tmp_path, subjects, [found, found], ["Benign", "Early"], ())
    assert [(s.path, target, weights) for s, target, _, weights in shown] == [
        ("malignant", 1, "w1"), ("benign", 0, "w0")]
