"""predict.py and inference: the evaluated figures, folded or exact; labels from folders; errors."""

import checks

import copy
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL, script, train
from scipy.special import softmax
from torch import nn

import data
import models
import predict
import train_central
from reporting import finished, inference, metrics

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tree, tmp_path_factory):
    return train(tree, tmp_path_factory.mktemp("predict") / "run", "--rounds", 2, "--lr", 0.003)


def rows_of(path):
    return list(csv.DictReader(path.open()))


def probabilities(rows, classes=("Benign", "Early", "Pre")):
    return np.array([[float(r[f"p_{c}"]) for c in classes] for r in rows])


# ---- the network --------------------------------------------------------------------------------

def trained_like(name, size=64):
    """Random weights, but BatchNorm statistics that folding must not lose."""
    model = models.build(name, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, models.BATCHNORM):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return inference.Trained(model.eval(), name, list("abcd"), size, CPU)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "efficientnet_b0", "mobilenet_v2",
                                  "densenet121", "shufflenet_v2_x0_5"])
def test_folded_and_unfolded_networks_agree(name):
    exact = trained_like(name)
    before = {k: v.clone() for k, v in exact.model.state_dict().items()}
    fast = inference.fast(exact)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    a, b = inference.logits(exact, pixels), inference.logits(fast, pixels)
    scale = a.abs().max().item()
    assert (a - b).abs().max().item() < (1e-4 if fast.dtype == torch.float32 else 0.1) * scale
    assert all(torch.equal(v, exact.model.state_dict()[k]) for k, v in before.items())
    left = sum(isinstance(m, models.BATCHNORM) for m in fast.model.modules())
    assert left == (62 if name == "densenet121" else 0)  # there half of them precede a convolution
    assert not any(m.training for m in fast.model.modules())
    single = torch.cat([inference.logits(exact, pixels[i:i + 1]) for i in range(3)])
    assert torch.allclose(a, single, atol=1e-4 * scale)


def with_precision(monkeypatch, dtype):
    """As on a machine of that native precision; bf16 is emulated elsewhere, to the same figures."""
    monkeypatch.setattr(models, "pick_precision", lambda amp, device: dtype)


def test_half_precision_is_used_where_it_keeps_the_promise(monkeypatch, capsys):
    with_precision(monkeypatch, torch.bfloat16)
    exact = trained_like("resnet18")
    fast = inference.fast(exact)
    assert fast.dtype == torch.bfloat16 and capsys.readouterr().err == ""
    kinds = {n: p.dtype for n, p in fast.model.named_parameters()}
    assert kinds.pop("fc.weight") == kinds.pop("fc.bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    a, b = inference.probabilities(exact, pixels), inference.probabilities(fast, pixels)
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.02


def small_difference_of_large_numbers(large, size=8):
    """Two channels that half precision cannot tell apart; the head takes their difference."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4))
    nn.init.constant_(net[0].bias, large)
    net[0].weight.data = torch.tensor([[0.1], [0.0]]).expand(2, 3).reshape(2, 3, 1, 1).clone()
    nn.init.zeros_(net[3].bias)
    net[3].weight.data = torch.tensor([[1., -1], [-1, 1], [0, 0], [0, 0]]) * 5
    return inference.Trained(net.eval(), "x", list("abcd"), size, CPU)


@pytest.mark.parametrize(("dtype", "large"), [
    (torch.bfloat16, 1000), (torch.float16, 1000), (torch.float16, 1e5)])  # the last overflows
def test_float32_is_used_where_half_precision_would_break_it(monkeypatch, capsys, dtype, large):
    with_precision(monkeypatch, dtype)
    exact = small_difference_of_large_numbers(large)
    fast = inference.fast(exact)
    pixels = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    broken = inference.Trained(copy.deepcopy(exact.model).to(dtype), "x", exact.classes, 8, CPU,
                               dtype)
    a, b, c = (inference.probabilities(t, pixels) for t in (exact, fast, broken))
    assert not np.abs(a - c).max() <= 0.02
    assert fast.dtype == torch.float32 and np.allclose(a, b, atol=5e-3)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(dtype) in error and "float32 is used" in error


def test_deviation_bounds_any_change_of_a_probability():
    """Logits that differ by (1, -1, 0, 0): at most 0.5, reached from no starting point."""
    def constant(*values):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
        nn.init.zeros_(net[1].weight)
        net[1].bias.data = torch.tensor(values, dtype=torch.float32)
        return inference.Trained(net.eval(), "x", list("abcd"), 8, CPU)
    a, b = constant(0, 0, 0, 0), constant(1, -1, 0, 0)
    assert inference.deviation(a, b) == pytest.approx(0.5)
    assert inference.deviation(a, a) == 0
    rng = np.random.default_rng(0)
    starts = torch.tensor(rng.normal(0, 3, (1000, 4)))
    moved = (starts.softmax(1) - (starts + torch.tensor([1, -1, 0, 0])).softmax(1)).abs().max()
    assert 0.4 < moved <= 0.5


def test_convolution_with_batchnorm_folded_by_hand(monkeypatch):
    with_precision(monkeypatch, None)
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Flatten()).eval()
    net[1].running_mean.copy_(torch.tensor([1., -2]))
    net[1].running_var.copy_(torch.tensor([4., 9]))
    fast = inference.fast(inference.Trained(net, "x", ["a", "b"], 1, CPU))
    folded = next(m for m in fast.model.modules() if isinstance(m, nn.Conv2d))
    factor = 1 / np.sqrt(np.array([4, 9]) + 1e-5)
    assert torch.allclose(folded.weight[:, :, 0, 0], net[0].weight[:, :, 0, 0]
                          * torch.tensor(factor, dtype=torch.float32)[:, None])
    assert folded.bias.tolist() == pytest.approx([-factor[0], 2 * factor[1]])


# ---- the script ---------------------------------------------------------------------------------

def test_fast_and_exact_reproduce_the_runs_own_predictions(run, tree, tmp_path):
    done = script(run, tree, "--out", tmp_path / "fast.csv", name="predict.py")
    assert done.returncode == 0, done.stderr
    predict.main([str(run), str(tree), "--exact", "--out", str(tmp_path / "exact.csv")])
    written = {r["path"]: r for r in rows_of(run / "predictions.csv")}
    for name, tolerance in (("fast", 0.02), ("exact", 1e-5)):
        rows = rows_of(tmp_path / f"{name}.csv")
        assert len(rows) == 72 and all(float(r["seconds"]) > 0 for r in rows)
        seen = 0
        for row in rows:
            known = written.get(str(row["path"])[len(str(tree)) + 1:])
            if known:
                seen += 1
                p, q = probabilities([row])[0], probabilities([known])[0]
                assert p == pytest.approx(q, abs=tolerance)
                if np.ptp(np.sort(q)[-2:]) > 0.04 or name == "exact":
                    assert row["prediction"] == known["prediction"]
        assert seen == len(written) == 14
    assert "accuracy" in done.stdout


def test_labels_come_from_the_folders_and_give_the_full_metrics(run, tree, tmp_path, capsys):
    predict.main([str(run), str(tree), "--out", str(tmp_path / "a.csv"), "--exact"])
    rows = rows_of(tmp_path / "a.csv")
    found = json.loads((tmp_path / "a.json").read_text())
    labels = np.array([["Benign", "Early", "Pre"].index(r["label"]) for r in rows])
    expected = metrics.measure(np.log(probabilities(rows)), labels, ["Benign", "Early", "Pre"])
    assert found["confusion"] == expected["confusion"] and found["n"] == 72
    assert found["accuracy"] == expected["accuracy"]
    # nine digits in the CSV can tie two images; a pair is worth 0.0009 in one class of three
    assert found["roc_auc"] == pytest.approx(expected["roc_auc"], abs=1e-3)
    capsys.readouterr()
    predict.main([str(run), str(tree / "Pre" / "Pre-001.png"), "--out", str(tmp_path / "b.csv")])
    assert not (tmp_path / "b.json").exists() and rows_of(tmp_path / "b.csv")[0]["label"] == ""
    predict.main([str(run), str(tree / "Pre"), "--out", str(tmp_path / "c.csv")])
    assert json.loads((tmp_path / "c.json").read_text())["per_class"]["Pre"]["support"] == 24


def test_other_class_names_and_malignant_against_benign(run, tree, tmp_path):
    other = tmp_path / "hospital"
    shutil.copytree(tree / "Benign", other / "healthy")
    shutil.copytree(tree / "Pre", other / "ALL" / "slide 7")
    shutil.copytree(tree / "Early", other / "unknown")
    names = tmp_path / "labels.json"
    names.write_text(json.dumps({"healthy": "Benign", "all": "Malignant"}))
    predict.main([str(run), str(other), "--map", str(names), "--out", str(tmp_path / "x.csv"),
                  "--exact"])
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["n"] == 22 + 24 and list(found["per_class"]) == ["Benign", "Malignant"]
    rows = [r for r in rows_of(tmp_path / "x.csv") if r["label"]]
    said = [(r["label"] == "Malignant", float(r["p_Benign"]) < 0.5) for r in rows]
    confusion = [[sum(s == (t, p) for s in said) for p in (False, True)] for t in (False, True)]
    assert found["confusion"] == confusion
    assert found["malignant"]["sensitivity"]["value"] == pytest.approx(
        confusion[1][1] / sum(confusion[1]))
    names.write_text(json.dumps({"healthy": "Benign", "ALL": "Pre", "unknown": "Early"}))
    predict.main([str(run), str(other), "--map", str(names), "--out", str(tmp_path / "y.csv")])
    assert json.loads((tmp_path / "y.json").read_text())["n"] == 72


def test_unreadable_files_are_told_at_the_end_and_the_rest_is_done(run, tree, tmp_path):
    place = tmp_path / "some"
    shutil.copytree(tree / "Pre", place)
    (place / "Pre-002.png").write_bytes(b"")
    (place / "text.jpg").write_text("no picture")
    done = script(run, place, "--out", tmp_path / "o.csv", name="predict.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = [x for x in done.stderr.splitlines() if x.startswith("unreadable: ")]
    assert len(told) == 2 and "Pre-002.png" in told[0] and "text.jpg" in told[1]
    assert len(rows_of(tmp_path / "o.csv")) == 23


def test_temperature_is_fitted_once_on_validation_and_kept(run, tree, tmp_path):
    val = finished.read_predictions(run, "val")
    assert len(val.paths) == 7
    predict.main([str(run), str(tree), "--calibrate", "--exact", "--out", str(tmp_path / "a.csv")])
    kept = json.loads((run / "temperature.json").read_text())
    grid = np.exp(np.linspace(-3, 3, 6001))
    losses = [-np.log(softmax(val.logits / t, axis=1))[np.arange(7), val.labels].mean()
              for t in grid]
    assert np.interp(kept["temperature"], grid, losses) == pytest.approx(min(losses), abs=1e-5)
    assert kept["n"] == 7 and kept["loss"][1] <= kept["loss"][0]
    plain = tmp_path / "b.csv"
    predict.main([str(run), str(tree), "--exact", "--out", str(plain)])
    p, q = probabilities(rows_of(tmp_path / "a.csv")), probabilities(rows_of(plain))
    assert p == pytest.approx(softmax(np.log(q) / kept["temperature"], axis=1), abs=1e-5)
    assert [r["prediction"] for r in rows_of(plain)] == \
        [r["prediction"] for r in rows_of(tmp_path / "a.csv")]
    (run / "temperature.json").write_text('{"temperature": 2.0}')
    predict.main([str(run), str(tree), "--calibrate", "--exact", "--out", str(tmp_path / "c.csv")])
    assert probabilities(rows_of(tmp_path / "c.csv")) == pytest.approx(
        softmax(np.log(q) / 2, axis=1), abs=1e-5)
    (run / "temperature.json").unlink()


def test_numbered_by_default_and_a_fold_by_name(run, tree, tmp_path, monkeypatch):
    train_central.main(["--data", str(tree), *SMALL, "--folds", "2", "--epochs", "1", "--out",
                        str(tmp_path / "folds")])
    with pytest.raises(checks.InputError, match="name one: fold1, fold2"):
        predict.main([str(tmp_path / "folds"), str(tree)])
    for _ in range(2):
        predict.main([str(tmp_path / "folds" / "fold2"), str(tree / "Pre")])
    assert {"predicted.csv", "predicted-2.csv"} <= {
        p.name for p in (tmp_path / "folds" / "fold2").iterdir()}


def test_labels_take_the_nearest_folder_that_names_a_class():
    names = predict.read_map(None, ["Benign", "Early", "Pre", "Pro"])
    root = data.Path("set")
    for path, label in (("set/Benign/a.png", "Benign"), ("set/early/x/a.png", "Early"),
                        ("set/[Malignant] Pro-B/a.png", "Pro"), ("set/a.png", ""),
                        ("set/Benign/Pre/a.png", "Pre")):
        assert predict.label_of(data.Path(path), root, names) == label
    assert predict.label_of(data.Path("Pre/a.png"), None, names) == ""


@pytest.mark.parametrize("line,words", [
    ("absent TREE", "it is no trained run"), ("RUN absent.png", "no such file or folder"),
    ("RUN EMPTY", "no image in"), ("RUN TREE --map absent.json", "absent.json"),
    ("RUN TREE --map BAD", "not a JSON object"), ("RUN TREE --map WRONG", "mapped to 'Pro'"),
    ("RUN TREE --out BAD", "exists already"), ("RUN TREE --client 3", "has no place here"),
    ("RUN TREE --device cuda:7", "not there"), ("RUN", "required: PATH")])
def test_bad_input_is_one_line(run, tree, tmp_path, capsys, line, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").write_text("[1]")
    (tmp_path / "wrong").write_text('{"x": "Pro"}')
    for name, path in (("RUN", run), ("TREE", tree), ("EMPTY", tmp_path / "empty"),
                       ("BAD", tmp_path / "bad"), ("WRONG", tmp_path / "wrong")):
        line = line.replace(name, str(path))
    with pytest.raises(SystemExit) as stop:
        checks.guard(lambda: predict.main(line.split()))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error
    assert error.count("\n") == 1 and "Traceback" not in error
