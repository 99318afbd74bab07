"""predict.py and inference: the evaluated figures, folded or exact; labels from folders; errors."""

import checks

import argparse
import copy
import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SMALL, clone, script, train, write_tree
from PIL import Image
from scipy.special import softmax
from torch import nn

import data
import models
import predict
import train_central
from dataset import synthetic, table
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


@pytest.mark.parametrize(("moved", "half"), [(0.0, True), (0.02, True), (0.0201, False),
                                             (0.3, False), (float("nan"), False)])
def test_half_precision_may_move_a_probability_by_two_hundredths(monkeypatch, capsys, moved, half):
    with_precision(monkeypatch, torch.bfloat16)
    monkeypatch.setattr(inference, "deviation", lambda a, b: moved)
    fast = inference.fast(small_difference_of_large_numbers(1))
    assert fast.dtype == (torch.bfloat16 if half else torch.float32)
    assert capsys.readouterr().err == ("" if half else (
        f"note: in torch.bfloat16 a probability could be off by {moved:.2f}, so float32 is "
        "used\n"))


def test_pixels_are_normalised_as_in_training_and_the_answer_is_a_distribution():
    net = nn.Sequential(nn.Flatten())
    trained = inference.Trained(net.eval(), "x", list("abc"), 1, CPU)
    pixels = torch.tensor([[0, 255, 51], [255, 0, 102]], dtype=torch.uint8)[:, :, None, None]
    expected = (pixels[:, :, 0, 0] / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225])
    assert torch.allclose(inference.logits(trained, pixels), expected, atol=1e-6)
    assert np.allclose(inference.probabilities(trained, pixels), softmax(expected.numpy(), 1))


def test_deviation_is_judged_on_the_same_sixteen_smears_four_of_each_class(monkeypatch):
    seen = []
    def note(trained, pixels):
        seen.append(pixels)
        return torch.zeros(len(pixels), 4)
    monkeypatch.setattr(inference, "logits", note)
    exact = small_difference_of_large_numbers(1)
    assert inference.deviation(exact, exact) == 0
    assert seen[0].shape == (16, 3, 8, 8) and torch.equal(*seen)
    for i, name in enumerate(["Benign", "Early", "Pre", "Pro"] * 4):
        drawn = synthetic.draw_one(name, 8, np.random.default_rng(i))
        assert np.array_equal(seen[0][i].permute(1, 2, 0), drawn)


def test_deviation_bounds_any_change_of_a_probability():
    """Logits that differ by (1, -1, 0, 0): at most 0.5, reached from no starting point."""
    def constant(*values):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
        nn.init.zeros_(net[1].weight)
        net[1].bias.data = torch.tensor(values, dtype=torch.float32)
        return inference.Trained(net.eval(), "x", list("abcd"), 8, CPU)
    a, b = constant(0, 0, 0, 0), constant(1, -1, 0, 0)
    assert inference.deviation(a, b) == pytest.approx(0.5)
    assert inference.deviation(a, a) == inference.deviation(b, b) == 0
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


def test_a_run_with_batchnorm_of_each_client_is_loaded_with_that_of_the_one_named(tmp_path):
    model = models.build("toynet", 2)
    shared, keys = clone(model.state_dict()), models.batchnorm_keys(model)
    own = {k: {key: torch.full_like(shared[key], k + 2) for key in keys} for k in (0, 3)}
    content = {"model": "toynet", "classes": ["a", "b"], "state": shared, "image_size": 20}
    torch.save(content | {"local_bn": own, "interventions": ["scale-bar"]}, tmp_path / "model.pt")
    for client in (0, 3):
        trained = inference.load(tmp_path, CPU, client)
        state = trained.model.state_dict()
        for key, value in (shared | own[client]).items():
            assert torch.equal(state[key], value)
        assert not trained.model.training and trained.dtype == torch.float32
        assert (trained.name, trained.classes, trained.image_size, trained.interventions) == (
            "toynet", ["a", "b"], 20, ("scale-bar",))
    for client in (None, 1):
        with pytest.raises(checks.InputError, match=r"--client must be one of \[0, 3\]"):
            inference.load(tmp_path, CPU, client)
    torch.save(content, tmp_path / "model.pt")
    assert inference.load(tmp_path, CPU).interventions == ()
    with pytest.raises(checks.InputError, match="one global model, --client has no place here"):
        inference.load(tmp_path, CPU, 0)


def test_the_first_client_is_number_0_and_the_device_is_found_by_itself():
    parser = argparse.ArgumentParser(exit_on_error=False)
    inference.add_arguments(parser)
    assert vars(parser.parse_args([])) == {"device": "auto", "client": None}
    assert parser.parse_args(["--client", "0"]).client == 0
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--client", "-1"])


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


def test_other_class_names_and_malignant_against_benign(run, tree, tmp_path, capsys):
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
    out = capsys.readouterr().out
    assert f"72 images to {tmp_path}/x.csv\n" in out  # no temperature
    assert f"all figures: {tmp_path}/x.json; 26 images without a known class left out\n" in out
    rows = [r for r in rows_of(tmp_path / "x.csv") if r["label"]]
    said = [(r["label"] == "Malignant", float(r["p_Benign"]) < 0.5) for r in rows]
    confusion = [[sum(s == (t, p) for s in said) for p in (False, True)] for t in (False, True)]
    assert found["confusion"] == confusion
    assert found["malignant"]["sensitivity"]["value"] == pytest.approx(
        confusion[1][1] / sum(confusion[1]))
    names.write_text(json.dumps({"healthy": "Benign", "ALL": "Pre", "unknown": "Early"}))
    predict.main([str(run), str(other), "--map", str(names), "--out", str(tmp_path / "y.csv")])
    assert json.loads((tmp_path / "y.json").read_text())["n"] == 72
    assert "left out" not in capsys.readouterr().out


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
    assert f"23 images to {tmp_path}/o.csv\n" in done.stdout and "left out" not in done.stdout


def test_a_temperature_is_where_the_mean_probability_of_the_truth_is_its_frequency():
    """Three of four are right at logits (2, 0): σ(2 / T) = 3/4. Where nothing or all is wrong, the
    search ends at e³ and its inverse."""
    logits = np.array([[2.0, 0.0]] * 4)
    assert predict.fit_temperature(logits, np.array([0, 0, 0, 1])) == pytest.approx(
        2 / np.log(3), rel=1e-4)
    ends = [predict.fit_temperature(logits / 20, np.full(4, y)) for y in (0, 1)]
    assert np.log(ends) == pytest.approx([-3, 3], abs=0.01)


def test_what_the_temperature_does_to_loss_and_calibration_is_kept_with_it(tmp_path):
    rows = [f"{i}.png,{'ab'[y]},{part},a,0.9,0.1" for i, (y, part) in enumerate(
        [(0, "val"), (0, "val"), (0, "val"), (1, "val"), (1, "test")])]
    (tmp_path / "predictions.csv").write_text("\n".join(
        ["path,label,split,prediction,p_a,p_b", *rows]) + "\n")
    t = predict.temperature(tmp_path)
    kept = json.loads((tmp_path / "temperature.json").read_text())
    assert kept["temperature"] == t == pytest.approx(np.log(9) / np.log(3), rel=1e-4)
    assert kept["fitted_on"] == "validation part" and kept["n"] == 4
    assert kept["ece"] == pytest.approx([0.15, 0], abs=1e-4)  # 0.9, then 0.75, against 3 of 4
    assert kept["loss"] == pytest.approx([-np.mean(np.log([p, p, p, 1 - p])) for p in (0.9, 0.75)])


def test_no_temperature_follows_where_every_validation_image_is_right(tmp_path):
    (tmp_path / "predictions.csv").write_text(
        "path,label,split,prediction,p_a,p_b\nx,a,val,a,0.9,0.1\ny,b,val,b,0.2,0.8\n")
    with pytest.raises(checks.InputError, match="every validation image is right"):
        predict.temperature(tmp_path)
    assert not (tmp_path / "temperature.json").exists()


def test_temperature_is_fitted_once_on_validation_and_kept(run, tree, tmp_path, capsys):
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
    assert f"72 images to {tmp_path}/c.csv, temperature 2.000\n" in capsys.readouterr().out
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


def test_images_come_in_the_order_given_and_what_is_no_image_is_counted(tmp_path, capsys):
    root = write_tree(tmp_path / "set", {"b": 1, "a": 1})
    single = root / "b" / "b-001.png"
    assert predict.find([str(single), str(root)]) == [
        (single, None), (root / "a" / "a-001.png", root), (single, root)]
    assert capsys.readouterr().err == ""
    for name in ("a/scan.dcm", "a/scan2.dcm", "b/noname"):
        (root / name).touch()
    assert len(predict.find([str(root / "a"), str(root / "b")])) == 2
    assert capsys.readouterr().err == "note: passed over 2 .dcm, 1 no suffix\n"
    single.unlink()
    with pytest.raises(checks.InputError, match="no image in .*/b; passed over 1 no suffix$"):
        predict.find([str(root / "b")])


def test_folder_names_mean_the_classes_of_the_run_and_of_the_public_layouts(tmp_path):
    assert predict.read_map(None, ["Benign", "Odd"]) == {
        "benign": "Benign", "Benign": "Benign", "odd": "Odd", "Odd": "Odd"}
    path = tmp_path / "map.json"
    def read(given, *classes):
        path.write_text(json.dumps(given))
        return predict.read_map(str(path), list(classes))
    assert read({"X": "b", "y": "a"}, "a", "b") == {"x": "b", "y": "a"}
    assert read({"x": "Malignant", "y": "Benign"}, "Benign", "Pre") == {
        "x": "Malignant", "y": "Benign"}
    three = ("Benign", "Malignant", "Normal")  # a run that knows Malignant needs no other words
    assert read({"x": "Malignant", "y": "Normal"}, *three) == {"x": "Malignant", "y": "Normal"}
    for given, classes, words in (
            ({"x": "Malignant"}, ["Early", "Pre"], "the run knows no Benign to tell Malignant"),
            ({"x": "Malignant", "y": "Pre"}, ["Benign", "Pre"],
             "'y' is mapped to 'Pre', not one of Benign, Malignant$")):
        with pytest.raises(checks.InputError, match=words):
            read(given, *classes)


def test_a_table_gives_labels_in_the_order_of_the_files(tmp_path, capsys):
    root = write_tree(tmp_path / "set", {"x": 4})
    files, names = sorted((root / "x").iterdir()), predict.read_map(None, ["Benign", "Early"])
    def read(rows, paths, header="path,label", skip=False):
        (tmp_path / "t.csv").write_text("\n".join([header, *rows]) + "\n")
        return predict.from_table(table.read(str(tmp_path / "t.csv")), SimpleNamespace(
            paths=list(map(str, paths)), skip_unlisted=skip), files, names)
    rows = ["x/x-003.png,early", "x/x-001.png,Benign", "x/x-002.png,", "x/x-004.png,odd"]
    assert read(rows, [root]) == (files, ["Benign", "", "Early", ""])
    assert capsys.readouterr().err == (
        f"note: --table {tmp_path}/t.csv: label(s) that the run does not know: odd\n")
    assert read(rows[:2], [root], skip=True) == ([files[0], files[2]], ["Benign", "Early"])
    assert capsys.readouterr().err == ""
    with pytest.raises(checks.InputError, match=r"2 image\(s\) are not in it .*x-002.png"):
        read(rows[:2], [root])
    for paths, header in (([root, root], "path,label"), ([files[0]], "path,label"),
                          ([root], "path,patient")):
        with pytest.raises(checks.InputError, match="needs a column label, and one folder that"):
            read(rows, paths, header)


def test_images_of_a_chunk_go_through_the_network_together_and_share_its_time(
        tmp_path, monkeypatch):
    """Five files in chunks of two, of which the third and the last are no images."""
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i in (0, 1, 3):
        Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(files[i])
    files[2].write_text("no image")
    files[4].write_text("no image")
    sizes, clock = [], iter([1.0, 7.0, 10.0, 14.0])
    def red(trained, pixels):
        sizes.append(len(pixels))
        return pixels[:, :2, 0, 0].float()
    monkeypatch.setattr(inference, "logits", red)
    monkeypatch.setattr(data, "EVAL_BATCH", 2)
    monkeypatch.setattr(predict, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    logits, seconds, bad = predict.predict(
        inference.Trained(nn.Identity(), "x", ["a", "b"], 4, CPU), files, 4.0)
    nan = np.nan
    assert sizes == [2, 1] and sorted(bad) == [2, 4]
    assert np.array_equal(logits, [[0, 0], [2.5, 0], [nan, nan], [7.5, 0], [nan, nan]], True)
    assert np.array_equal(seconds, [3, 3, nan, 4, nan], True)


def test_subtypes_add_up_to_malignant_and_only_labelled_images_count():
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    logits, classes = np.log(p) + np.array([[0.0], [1], [-2], [3]]), ["Early", "Benign", "Pre"]
    logits = np.concatenate([logits, np.full((1, 3), np.nan)])
    labels = ["Malignant", "", "Benign", "Malignant", "Benign"]
    binary = np.array([[0.3, 0.7], [0.5, 0.5], [0.1, 0.9]])
    expected = metrics.measure(np.log(binary), np.array([1, 0, 1]), ["Benign", "Malignant"])
    found = predict.evaluate(logits, labels, classes, binary=True)
    assert list(found["per_class"]) == ["Benign", "Malignant"] and found["n"] == 3
    healthy = predict.evaluate(logits, ["", "", "Benign", "", ""], classes, binary=True)
    assert list(healthy["per_class"]) == ["Benign", "Malignant"]  # whoever else is there
    for key in ("loss", "brier", "ece", "roc_auc"):
        assert found[key] == pytest.approx(expected[key])
    assert predict.evaluate(logits, ["Early", "", "Pre", "Pre", "Pre"], classes) == metrics.measure(
        logits[[0, 2, 3]], np.array([0, 2, 2]), classes)
    own = predict.evaluate(logits, labels, ["Malignant", "Benign", "Odd"])  # the run's own word
    assert list(own["per_class"]) == ["Malignant", "Benign", "Odd"]
    assert predict.evaluate(logits, ["", "", "", "", "Early"], classes) is None


def test_a_row_of_the_csv_is_the_softmax_and_an_unreadable_image_has_none(tmp_path):
    logits = np.array([[np.log(3), 0.0], [np.nan] * 2, [0.0, np.log(2)]])
    predict.write_csv(tmp_path / "p.csv", ["x.png", "y.png", "z.png"], ["b", "a", ""], logits,
                      np.array([0.25, np.nan, 0.0000014]), ["a", "b"])
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        "path,prediction,p_a,p_b,seconds,label", "x.png,a,0.75,0.25,0.250000,b",
        "z.png,b,0.333333333,0.666666667,0.000001,"]


@pytest.mark.parametrize("line,words", [
    ("absent TREE", "it is no trained run"), ("RUN absent.png", "no such file or folder"),
    ("RUN EMPTY", "no image in"), ("RUN TREE --map absent.json", "absent.json"),
    ("RUN TREE --map BAD", "not a JSON object"), ("RUN TREE --map WRONG", "mapped to 'Pro'"),
    ("RUN TREE --out BAD", "exists already"), ("RUN TREE --client 3", "has no place here"),
    ("RUN TREE --out LINK", "exists already"), ("RUN TREE --out .", "not the name of a file"),
    ("EMPTY TREE", "not a model that this project"),
    ("RUN TREE --device cuda:7", "not there"), ("RUN", "required: PATH")])
def test_bad_input_is_one_line(run, tree, tmp_path, capsys, line, words):
    (tmp_path / "empty").mkdir()
    torch.save({"weights": 1}, tmp_path / "empty" / "model.pt")
    (tmp_path / "bad").write_text("[1]")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "wrong").write_text('{"x": "Pro"}')
    for name, path in (("RUN", run), ("TREE", tree), ("EMPTY", tmp_path / "empty"),
                       ("BAD", tmp_path / "bad"), ("WRONG", tmp_path / "wrong"),
                       ("LINK", tmp_path / "link")):
        line = line.replace(name, str(path))
    with pytest.raises(SystemExit) as stop:
        checks.guard(lambda: predict.main(line.split()))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error
    assert error.count("\n") == 1 and "Traceback" not in error
