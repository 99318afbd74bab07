"""explain.py on a real small run: what it writes, that it repeats, and what it refuses."""

import checks

import argparse
import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, clone, equal, script, toy_images, train

import data
import explain
import models
from dataset import interventions
from explaining import attribution, faithfulness
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
    right = test.labels.copy()
    assert explain.choose(test, right, 2) == {2: "rule", 7: "rule", 10: "rule"}
    assert list(explain.choose(test, right, 10)) == [*range(11)]
    right[4] = 1
    assert explain.choose(test, right, 1) == {5: "rule", 10: "rule", 4: "misclassified"}


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


@pytest.mark.parametrize(("off", "warned"), [(0.0009, False), (0.0011, True), (-0.0011, True)])
def test_probabilities_may_differ_by_a_thousandth(monkeypatch, tmp_path, capsys, off, warned):
    """Of every image the pixels, label and probabilities that belong to its path."""
    images = toy_images(6, size=14)
    p = np.linspace(0.1, 0.4, 6)
    paths = images.paths[::-1]  # another order than that of the images
    test = finished.Predictions(paths, images.labels.numpy()[::-1].copy(), np.log(
        np.stack([p, p, 1 - 2 * p], 1)), images.classes)
    monkeypatch.setattr(finished, "read_predictions", lambda folder: test)
    monkeypatch.setattr(finished, "load_images", lambda *a: (None, images))

    def probabilities(trained, pixels):
        found = [next(k for k in range(6) if torch.equal(x, images.pixels[k])) for x in pixels]
        rows = np.exp(test.logits)[::-1][found].copy()
        rows[0, 1] += off
        return rows
    monkeypatch.setattr(inference, "probabilities", probabilities)
    of_all, of_one = (argparse.Namespace(client=client) for client in (None, 0))
    explain.of_the_run(tmp_path, of_one, 2)  # a client's own network differs from what is written
    assert capsys.readouterr().err == ""
    subjects = explain.of_the_run(tmp_path, of_all, 2)
    assert sorted(s.path for s in subjects) == sorted(paths)
    for s in subjects:
        k = images.paths.index(s.path)
        assert torch.equal(s.pixels, images.pixels[k]) and s.truth == int(images.labels[k])
        assert s.p[0] == pytest.approx(p[::-1][k])
    told = capsys.readouterr().err
    assert told.startswith("WARNING: probabilities differ by 0.0011 from") if warned else not told


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


def subject(p=(0.2, 0.8), truth=None, size=28, chosen="rule", path="x"):
    pixels = torch.full((3, size, size), 40, dtype=torch.uint8)
    pixels[0, 4:8, 20:24] = 240
    return explain.Subject(path, pixels, truth, np.array(p), chosen)


def patch_left(pixels):
    """Class 1 with the share of the subject's patch that is left."""
    red = (pixels[:, 0, 4:8, 20:24].float() > 200).float().mean((1, 2)).numpy()
    return np.stack([1 - red, red], 1)


def test_the_class_predicted_is_explained_and_the_true_one_where_it_differs():
    assert subject().targets() == [1]
    assert subject(truth=1).targets() == [1]
    assert subject(truth=0).targets() == [1, 0]
    assert subject(p=(0.8, 0.2), truth=1).targets() == [0, 1]


def test_gradients_are_at_the_normalised_image():
    """Of a linear network integrated gradients are weight times input, by hand."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1, bias=False), torch.nn.Flatten(),
                              torch.nn.Linear(3 * 28 * 28, 2))
    net[0].weight.data = torch.eye(3).view(3, 3, 1, 1)
    args = argparse.Namespace(steps=2, layer=None)
    maps = explain.gradient_maps(net, subject(), 1, args)
    assert list(maps) == ["gradient", "integrated-gradients", "grad-cam"]
    x = data.normalise(subject().pixels[None].float() / 255)[0]
    weight = net[2].weight[1].detach().view(3, 28, 28)
    expected = (weight * x).sum(0).numpy()
    assert np.allclose(maps["integrated-gradients"], expected, atol=1e-6)


def test_lime_repeats_by_seeds_from_0_and_the_first_is_drawn(monkeypatch):
    segments, asked = np.arange(28 * 28).reshape(28, 28) % 2, []

    def lime(classify, pixels, targets, samples, seed):
        asked.append((targets, samples, seed))
        return segments, {t: np.array([t + seed, 10.0]) for t in targets}
    monkeypatch.setattr(attribution, "lime", lime)
    monkeypatch.setattr(explain, "gradient_maps", lambda model, s, target, args: {"g": target})
    found = explain.explain(SimpleNamespace(model=None), subject(truth=0),
                            argparse.Namespace(lime_seeds=3, samples=20), None)
    assert asked == [([1, 0], 20, seed) for seed in (0, 1, 2)]
    assert found["segments"] is segments and [w[1][0] for w in found["lime"]] == [1, 2, 3]
    assert found["maps"]["g", 1] == 1 and found["maps"]["g", 0] == 0
    for target in (0, 1):
        assert np.array_equal(found["maps"]["lime", target], np.where(segments == 0, target, 10))


def test_an_image_is_checked_on_its_predicted_class():
    """The map of the patch removes the evidence first, its opposite last; three quarters of another
    lie in the corner."""
    right, wrong, corner = (np.zeros((28, 28)) for _ in range(3))
    right[4:8, 20:24], corner[27, 27], corner[0, 0] = 1, 3, -1
    found = {"maps": {(m, 1): right for m in explain.METHODS} | {
        (m, 0): wrong for m in explain.METHODS}, "lime": [{1: np.arange(9.0)}] * 2}
    found["maps"]["gradient", 1], found["maps"]["grad-cam", 1] = -right, corner
    args = argparse.Namespace(rectangle=(0.7, 0.85, 1.0, 1.0))
    out = explain.check(subject(truth=0), found, args, patch_left, seed=4)
    assert list(out) == list(explain.METHODS)
    chance = faithfulness.random_area(patch_left, subject().pixels, 1, 4)
    assert {m["random_area"] for m in out.values()} == {chance}
    assert out["lime"]["deletion_area"] == pytest.approx(0.5 / 14)
    assert out["gradient"]["deletion_area"] == pytest.approx(1 - 0.5 / 14)
    assert [out[m]["corner"] for m in explain.METHODS] == [0, 0, 0.75, 0]
    bright = interventions.background(subject().pixels)
    assert out["lime"]["background"] == right[bright].sum() / 16
    assert out["lime"]["jaccard"] == 1 and "jaccard" not in out["gradient"]
    found["maps"]["gradient", 1] = np.full((28, 28), 0.25)  # it puts the cells in no order
    flat = explain.check(subject(truth=0), found, args, patch_left, seed=4)
    assert flat["gradient"]["deletion_area"] is None and flat["lime"] == out["lime"]
    both = explain.verdicts([out, flat, out], {m: [[0.0] * 3] for m in explain.METHODS},
                            [subject()] * 3, args)["methods"]
    assert (both["gradient"]["deletion_gain"]["n"], both["lime"]["deletion_gain"]["n"]) == (2, 3)


def test_weights_are_randomised_from_the_head_to_those_of_the_network_of_seed_1(monkeypatch):
    trained = inference.Trained(models.build("toynet", 3, seed=7).eval(), "toynet", ["a", "b", "c"],
                                28, CPU)
    before, fresh = clone(trained.model.state_dict()), models.build("toynet", 3, seed=1)
    states, asked, updates = [], [], []

    def gradient_maps(model, s, target, args):
        states.append(clone(model.state_dict()))
        return {"gradient": np.eye(3) * target}
    monkeypatch.setattr(explain, "gradient_maps", gradient_maps)
    monkeypatch.setattr(attribution, "lime", lambda classify, pixels, targets, samples, seed: (
        asked.append((targets, samples, seed, classify(pixels[None]))),
        (np.array([[0, 1]]), {t: np.array([1.0, 2.0]) for t in targets}))[1])
    founds = [{"maps": {("gradient", 1): np.eye(3), ("lime", 1): np.array([[2.0, 1.0]])}}]
    found = explain.randomise(trained, [subject(p=(0.1, 0.8, 0.1))], founds,
                              argparse.Namespace(samples=30),
                              SimpleNamespace(update=lambda: updates.append(1)))
    assert explain.STAGES == (0, 0.25, 0.5, 0.75, 1) and len(updates) == len(states) == 5
    changed = [{k.split(".")[0] for k in s if not torch.equal(s[k], before[k])} for s in states]
    assert changed[0] == {"fc"} and changed[-1] == {"conv1", "conv2", "fc"}
    assert equal(states[-1], fresh.state_dict()) and equal(trained.model.state_dict(), before)
    ((targets, samples, seed, p),) = asked  # LIME at the last stage alone
    assert (targets, samples, seed) == ([1], 30, 0)
    x = data.normalise(subject().pixels[None].float() / 255)
    with torch.no_grad():
        assert np.allclose(p, fresh.eval()(x).softmax(1).numpy(), atol=1e-5)
    assert found == {"gradient": [[pytest.approx(1)]] * 5, "integrated-gradients": [[]] * 5,
                     "grad-cam": [[]] * 5, "lime": [[]] * 4 + [[pytest.approx(-1)]]}


def test_verdicts_by_hand():
    checks = [{m: {"random_area": 0.5 + k / 10, "deletion_area": 0.25, "corner": k / 4,
                   "background": None, "jaccard": 0.5} for m in explain.METHODS} for k in (0, 1)]
    found = explain.verdicts(checks, {m: [[0.9, 0.9], [0.1, 0.3]] for m in explain.METHODS},
                             [subject(), subject()],
                             argparse.Namespace(rectangle=(0.5, 0.5, 1.0, 1.0)))
    assert found["images"] == 2 and found["rectangle"] == [0.5, 0.5, 1.0, 1.0]
    assert found["stages"] == [0, 0.25, 0.5, 0.75, 1]
    assert found["area"] == {"corner": 0.25, "background": pytest.approx(
        interventions.background(subject().pixels).mean())}
    for method, m in found["methods"].items():
        assert m["deletion_gain"] == faithfulness.mean_interval([0.25, 0.35])
        assert m["rank_correlation"] == [faithfulness.mean_interval(v) for v in ([0.9, 0.9],
                                                                                 [0.1, 0.3])]
        assert m["corner"] == faithfulness.mean_interval([0, 0.25])
        assert m["background"] == {"n": 0, "value": None, "low": None, "high": None}
        assert ("jaccard" in m) == (method == "lime")
    sure = explain.verdicts(checks[:1] * 2, {m: [[0.9, 0.9], [0.1, 0.1]] for m in explain.METHODS},
                            [subject()], argparse.Namespace(rectangle=(0.5, 0.5, 1.0, 1.0)))
    assert {(m["faithful"], m["sensitive"]) for m in sure["methods"].values()} == {(True, True)}
    one = explain.verdicts(checks[:1], {m: [[0.1]] for m in explain.METHODS}, [subject()],
                           argparse.Namespace(rectangle=(0.5, 0.5, 1.0, 1.0)))
    assert {(m["faithful"], m["sensitive"]) for m in one["methods"].values()} == {(False, False)}


def verdict(**fields):
    def sure(x):
        return {"n": 9, "value": x, "low": x, "high": x}
    return {"faithful": True, "sensitive": False, "deletion_gain": sure(0.1), "corner": sure(0.2),
            "background": sure(0.3), "rank_correlation": [sure(0.4), sure(0.5)]} | {
                k: sure(v) if isinstance(v, float) else v for k, v in fields.items()}


def test_the_table_of_the_verdicts_by_column():
    text = explain.verdict_table({"images": 9, "area": {"corner": 0.045, "background": 0.25},
                                  "methods": {"gradient": verdict(),
                                              "lime": verdict(faithful=False, sensitive=True,
                                                              jaccard=0.6)}})
    assert text.startswith("n = 9 images")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("|")]
    cells = [f"{x:.4f} ({x:.4f}–{x:.4f})" for x in (0.1, 0.2, 0.3, 0.5, 0.6)]  # 0.5: the last stage
    assert rows[0][3:] == ["random − deletion area", "share in the corner",
                           "share on the brightest quarter", "ρ after full randomisation",
                           "Jaccard over seeds"]
    assert rows[2:] == [
        ["gradient", "faithful", "**not shown sensitive**", *cells[:4], "–"],
        ["lime", "**not shown faithful**", "sensitive to the weights", *cells],
        ["(share of area)", "", "", "", "0.0450", "0.2500", "", ""]]


def test_explanations_csv_row_by_row(tmp_path):
    """Checks stand in the rows of the predicted class, and of images that were checked."""
    subjects = [subject(truth=0, path="one"), subject(chosen="misclassified", path="two")]
    one = np.full((2, 2), 0.25)
    founds = [{"maps": {("lime", 1): one, ("lime", 0): -one}}, {"maps": {("gradient", 1): one}}]
    checked = {"lime": {"deletion_area": 0.125, "random_area": 0.5, "corner": None,
                        "background": 1.0, "jaccard": 2 / 3}}
    (tmp_path / "explanations").mkdir()
    explain.write_table(tmp_path / "explanations", subjects, founds, [checked, None], ["a", "b/c"])
    rows = [list(row.values()) for row in table(tmp_path)]
    assert rows == [
        ["one", "a", "b/c", "0.800000", "rule", "lime", "b/c", "maps/000-lime-1.npy", "0.25",
         "0.125000", "0.500000", "", "1.000000", "0.666667"],
        ["one", "a", "b/c", "0.800000", "rule", "lime", "a", "maps/000-lime-0.npy", "0.25",
         *[""] * 5],
        ["two", "", "b/c", "0.800000", "misclassified", "gradient", "b/c",
         "maps/001-gradient-1.npy", "0.25", *[""] * 5]]
    assert np.array_equal(np.load(tmp_path / "explanations" / rows[1][7]), -one)


@pytest.mark.parametrize("of_the_test", [True, False])
def test_the_runs_report_has_the_verdicts_on_its_test_images_once(tmp_path, of_the_test):
    found = {"images": 9, "area": {"corner": 0.1, "background": 0.25}, "methods": {}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "map.png").touch()
    for _ in range(2):
        explain.write_report(tmp_path, tmp_path / "out", found, [subject()], of_the_test)
        assert not (tmp_path / "report.md").exists()  # none is begun
    own = (tmp_path / "out" / "report.md").read_text()
    assert "- x (rule)" in own and "![map](map.png)" in own and explain.verdict_table(found) in own
    (tmp_path / "two").mkdir()
    explain.write_report(tmp_path, tmp_path / "two", found | {"client": 0}, [subject()], False)
    assert "\n\nThe network of client 0. n = 9" in (tmp_path / "two" / "report.md").read_text()
    (tmp_path / "report.md").write_text("# Run\n\nwords\n")
    for _ in range(2):
        explain.write_report(tmp_path, tmp_path / "out", found, [subject()], of_the_test)
    added = (f"\n\n## Explanations\n\n{explain.verdict_table(found)}\n\n"
             "Pictures and raw maps: out/report.md\n") if of_the_test else ""
    assert (tmp_path / "report.md").read_text() == "# Run\n\nwords\n" + added


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
    report = (explained[0] / "report.md").read_text()
    explain.main([str(explained[0]), *QUICK, "--images", *map(str, files)])
    latest = max(explained[0].glob("explanations*"), key=lambda p: p.stat().st_mtime_ns)
    assert latest.name != "explanations"  # the first ones stay
    assert (explained[0] / "report.md").read_text() == report
    rows = table(explained[0], latest.name)
    assert {r["path"] for r in rows} == set(map(str, files))
    assert {r["chosen"] for r in rows} == {"given"} and {r["truth"] for r in rows} == {""}


def test_a_client_of_fedbn_is_named(tree, tmp_path):
    out = train(tree, tmp_path / "bn", "--bn", "local", "--clients", 2, "--rounds", 1)
    with pytest.raises(checks.InputError, match=r"--client must be one of \[0, 1\]"):
        inference.load(out, torch.device("cpu"))
    one, two = (inference.load(out, torch.device("cpu"), k).model.state_dict() for k in (0, 1))
    assert any(not torch.equal(one[k], two[k]) for k in one)


def test_what_cannot_be_written_is_said_before_the_work(explained, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "explain", lambda *a: pytest.fail("work was done"))
    shutil.copytree(explained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "explanations")
    (tmp_path / "run" / "explanations").symlink_to(tmp_path / "nowhere")
    with pytest.raises(checks.InputError, match="leads through a broken link"):
        explain.main([str(tmp_path / "run")])


@pytest.mark.parametrize("line,words", [
    ("absent", "it is no trained run"), ("RUN --layer layer9", "no such module"),
    ("RUN --layer fc", "no feature map"), ("RUN --images absent.png", "--images absent.png"),
    ("RUN --client 0", "--client has no place here"), ("RUN --per-class 0", "argument --per-class"),
    ("RUN --samples 3", "argument --samples"), ("RUN --lime-seeds 1", "argument --lime-seeds"),
    ("RUN --rectangle 0 0 2 1", "argument --rectangle"),
    ("RUN --rectangle 0.5 0 0.2 1", "left < right"),
    ("RUN --rectangle 0.5 0 0.5 1", "left < right"),
    ("RUN --rectangle 0 0.5 1 0.5", "top < bottom"), ("RUN --steps 0", "argument --steps"),
    ("RUN --rectangle -0.1 0 1 1", "argument --rectangle"), ("RUN --device cuda:7", "not there")])
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
    least = parser.parse_args(["run", "--per-class", "1", "--steps", "1", "--samples", "10",
                               "--lime-seeds", "2", "--rectangle", *"0011"])
    assert (least.per_class, least.steps, least.samples, least.lime_seeds, least.rectangle) == (
        1, 1, 10, 2, [0, 0, 1, 1])


@pytest.mark.parametrize(("size", "words"), [(13, "images of 13 pixels are too small to explain"),
                                             (14, "the images are read")])
def test_images_have_a_pixel_for_every_cell_that_deletion_removes(monkeypatch, size, words):
    def read(*args):
        raise checks.InputError("the images are read")
    monkeypatch.setattr(inference, "load", lambda *a: SimpleNamespace(
        image_size=size, model=torch.nn.Conv2d(3, 1, 1)))
    monkeypatch.setattr(explain, "of_the_run", read)
    with pytest.raises(checks.InputError, match=words):
        explain.main(["run", "--device", "cpu"])


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
