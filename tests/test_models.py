"""Networks: sizes, heads, BatchNorm by isinstance, weights in and out, refusals."""

from checks import InputError

import argparse
import io
import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from helpers import BNNet, equal
from torch import nn

import models
from reporting import architecture
from training import evaluation


@pytest.mark.parametrize("name,parameters,batchnorms,entries", [
    ("resnet50", 23_516_228, 53, 320), ("vgg16", None, 0, 32),
    ("efficientnet_b0", None, 49, None), ("resnet18", None, 20, 122),
    ("mobilenet_v2", None, 52, None)])
def test_parameter_batchnorm_and_entry_counts(name, parameters, batchnorms, entries):
    with torch.device("meta"):
        reference = torchvision.models.get_model(name, num_classes=4)
    model = models.build(name, 4) if name != "vgg16" else reference  # 134 million: shapes suffice
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert parameters in (None, count)
    assert sum(isinstance(m, models.BATCHNORM) for m in model.modules()) == batchnorms
    assert len(models.batchnorm_keys(model)) == 5 * batchnorms
    assert entries in (None, len(model.state_dict()))
    missed = [n for n, m in model.named_modules()
              if isinstance(m, models.BATCHNORM) and "bn" not in n]
    assert len(missed) == {"resnet50": 4, "efficientnet_b0": 49}.get(name, len(missed))


def test_table_3_of_the_paper(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["architecture.py", "resnet50", "--image-size", "32"])
    architecture.main()
    out = capsys.readouterr().out
    assert "fc            (4,)                         8,196         8,196" in out
    assert "23,516,228    23,516,228" in out and "BatchNorm layers: 53" in out
    monkeypatch.setattr("sys.argv", ["architecture.py", "resnet50", "--image-size", "32",
                                     "--train-from", "fc"])
    architecture.main()
    assert "23,516,228         8,196" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["architecture.py", "vit_b_16"])  # 768 are in no module
    architecture.main()
    assert "85,801,732    85,801,732" in capsys.readouterr().out


def test_the_table_row_by_row(capsys, monkeypatch):
    """By hand: 224 pixels by default become (224 - 3) // 2 + 1 = 111, and those 55."""
    monkeypatch.setattr("sys.argv", ["architecture.py", "toynet", "--train-from", "conv2",
                                     "--classes", "2"])
    architecture.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [["module", "output", "shape", "parameters", "trainable"],
                         ["conv1", "(16,", "111,", "111)", str(16 * 27), "0"],
                         ["norm", "(16,", "111,", "111)", "32", "0"],
                         ["relu1", "(16,", "111,", "111)", "0", "0"]]
    assert lines[4] == ["conv2", "(24,", "55,", "55)", "3,456", "3,456"]
    assert lines[-3:-1] == [["fc", "(2,)", "50", "50"], ["all", "4,018", "3,554"]]
    assert " ".join(lines[-1]) == "head: fc; BatchNorm layers: 2; state entries: 14"
    monkeypatch.setattr("sys.argv", ["architecture.py", "toynet", "--image-size", "8"])
    architecture.main()  # four classes by default
    assert "fc            (4,) " in capsys.readouterr().out
    for flag, value in (("--classes", "1"), ("--image-size", "7")):
        monkeypatch.setattr("sys.argv", ["architecture.py", "toynet", flag, value])
        with pytest.raises(SystemExit):
            architecture.main()
        assert f"argument {flag}" in capsys.readouterr().err


def test_head_is_xavier_uniform_and_everything_comes_from_the_seed():
    before = torch.get_rng_state()
    one, two, other = (models.build("resnet18", 4, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(one.state_dict(), two.state_dict())
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)
    bound = (6 / (512 + 4)) ** 0.5
    assert not one.fc.bias.any() and 0.95 * bound < one.fc.weight.abs().max() <= bound
    assert one.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert equal(models.build("toynet", 3).state_dict(), models.build("toynet", 3,
                                                                      seed=0).state_dict())


def test_networks_without_one_linear_head_are_refused():
    with pytest.raises(InputError, match="does not end in one linear layer"):
        models.build("squeezenet1_1", 4)
    with pytest.raises(InputError, match="unknown model 'resnet49'"):
        models.build("resnet49", 4)


def test_the_head_is_the_last_linear_layer_whatever_does_nothing_after_it():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)),
                        nn.Identity())
    assert models.head_name(net) == "1.0"
    with pytest.raises(InputError, match="Sequential does not end in one linear layer"):
        models.head_name(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


# ---- freezing -----------------------------------------------------------------------------

def test_train_from_freezes_all_that_comes_before():
    model = models.build("resnet18", 4)
    models.freeze(model, "layer4")
    free = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert free == {"layer4", "fc"}
    models.train_mode(model)
    for name, module in model.named_modules():
        if isinstance(module, models.BATCHNORM):
            assert module.training == name.startswith("layer4"), name
    with pytest.raises(InputError, match="conv1, .*layer4"):
        models.freeze(model, "layer5")


def test_needs_batch():
    model = BNNet()
    assert models.needs_batch(model)
    models.freeze(model, batchnorm=True)
    assert not models.needs_batch(model) and not models.needs_batch(nn.Linear(2, 2))


def test_what_a_network_cannot_take_is_said_in_one_line():
    with pytest.raises(InputError, match="^--image-size 2 does not suit Sequential: "
                                         "(Calculated|Given) [^\n]*size[^\n]*$"):
        models.check_size(models.build("toynet", 3), 2)


# ---- weights --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def imagenet_like():
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=1000)


def test_imagenet_weights_come_from_the_hub_cache(imagenet_like, tmp_path, monkeypatch, capsys):
    """The real loading code, fed with a file of ours where torchvision's download would lie."""
    url = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"].url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(imagenet_like.state_dict(), folder / url.rsplit("/", 1)[-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = models.build("resnet18", 4, "imagenet")
    theirs, ours = imagenet_like.state_dict(), model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if not k.startswith("fc."))
    assert ours["fc.weight"].shape == (4, 512)
    assert "head of 1000 classes dropped, a new one of 4" in capsys.readouterr().out
    torch.save({"fc.weight": Bomb()}, folder / url.rsplit("/", 1)[-1])  # somebody else's file
    with pytest.raises(InputError, match="could not be had"):
        models.build("resnet18", 4, "imagenet")
    assert "this code ran" not in capsys.readouterr().out


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def offline(url, path, checksum, **kwargs):
        assert f"-{checksum}." in url  # what comes is compared with the sum in its name
        raise urllib.error.URLError("no route")
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="--weights PATH, or --weights none"):
        models.build("resnet18", 4, "imagenet")


def test_weights_from_before_the_counters_of_batchnorm_are_taken(tmp_path, capsys):
    donor = models.build("toynet", 3, seed=1).state_dict()
    old = {k: v for k, v in donor.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert equal(models.build("toynet", 3, str(tmp_path / "old.pth")).state_dict(), donor)
    assert capsys.readouterr().out == ""


def test_a_file_without_a_head_or_with_half_of_one(tmp_path, capsys):
    """Where the head is the whole classifier, its absence needs no line."""
    donor = models.build("toynet", 3, seed=1).state_dict()
    trunk = {k: v for k, v in donor.items() if not k.startswith("fc.")}
    torch.save(trunk, tmp_path / "trunk.pth")
    found = models.build("toynet", 3, str(tmp_path / "trunk.pth")).state_dict()
    assert equal({k: found[k] for k in trunk}, trunk) and capsys.readouterr().out == ""
    torch.save(trunk | {"fc.bias": torch.zeros(9)}, tmp_path / "half.pth")
    models.build("toynet", 3, str(tmp_path / "half.pth"))
    assert capsys.readouterr().out == (
        f"{tmp_path / 'half.pth'}: head of ? classes dropped, a new one of 3\n")


def test_state_dict_file_in_half_precision(imagenet_like, tmp_path, capsys):
    half = {k: v.half() if v.is_floating_point() else v
            for k, v in imagenet_like.state_dict().items()}
    torch.save(half, tmp_path / "w.pth")
    state = models.build("resnet18", 4, str(tmp_path / "w.pth")).state_dict()
    assert torch.equal(state["layer1.0.conv1.weight"], half["layer1.0.conv1.weight"].float())
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    assert "dropped" in capsys.readouterr().out


def test_model_pt_of_ours_round_trip(tmp_path, capsys):
    model = models.build("resnet18", 4, seed=5)
    classes = ["a", "b", "c", "d"]
    args = argparse.Namespace(model="resnet18", image_size=32, remove=[])
    content = evaluation.bundle(args, model, classes, {
        "epoch": 1, "state": model.state_dict(), "local_bn": {}})
    models.save(content, tmp_path / "model.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    loaded = models.read_file(tmp_path / "model.pt")
    assert equal(loaded["state"], model.state_dict())
    assert {k: v.shape for k, v in loaded["state"].items()} == {
        k: v.shape for k, v in model.state_dict().items()}
    path = str(tmp_path / "model.pt")
    again = models.build("resnet18", 4, path, seed=0, classes=classes)
    assert equal(again.state_dict(), model.state_dict())
    other = models.build("resnet18", 4, path, seed=0, classes=["a", "b", "c", "e"])
    assert not torch.equal(other.fc.weight, model.fc.weight)
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    assert capsys.readouterr().out == f"{path}: its classes differ, head dropped\n"
    assert equal(models.build("resnet18", 4, path).state_dict(), model.state_dict())
    assert capsys.readouterr().out == ""  # and without a list of classes any are the same
    with pytest.raises(InputError, match="holds resnet18, not resnet34"):
        models.build("resnet34", 4, path)
    models.save(content | {"local_bn": {0: {}}}, tmp_path / "model.pt")  # FedBN
    with pytest.raises(InputError, match="made with --bn local, every client has its own"):
        models.build("resnet18", 4, path)


class Bomb:
    def __reduce__(self):
        return (print, ("this code ran",))


def bad_files(folder, state):
    whole = io.BytesIO()
    torch.save(state, whole)
    torch.save(state, folder / "good.pt")
    (folder / "cut.pt").write_bytes(whole.getvalue()[:5000])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("not weights")
    torch.save({"state": Bomb()}, folder / "code.pt")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Bomb()))
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)  # as torchvision's old files
    (folder / "old.pt").write_bytes(old.getvalue()[:5000])
    torch.save([1, 2], folder / "list.pt")
    torch.save({}, folder / "hollow.pt")
    torch.save(state | {"conv1.weight": 3}, folder / "number.pt")
    torch.save({k: v for k, v in state.items() if k != "conv1.weight"}, folder / "missing.pt")
    torch.save(state | {"more": torch.zeros(1)}, folder / "extra.pt")
    torch.save(state | {"conv1.weight": torch.zeros(1)}, folder / "shape.pt")
    torch.save(state | {"conv1.weight": state["conv1.weight"].to(torch.int8)}, folder / "whole.pt")


@pytest.mark.parametrize("name,words", [
    ("absent.pt", "no such file"), ("cut.pt", "truncated"), ("empty.pt", "truncated"),
    ("hollow.pt", "no state dict"), ("number.pt", "shape or type of conv1.weight: 3, "),
    ("text.pt", "refused|truncated"), ("code.pt", "refused"), ("list.pt", "no state dict"),
    ("pickle.pt", "refused"), ("old.pt", "truncated"),
    ("missing.pt", "another architecture.*conv1.weight"), ("extra.pt", "architecture.*more"),
    ("shape.pt", "wrong shape or type of conv1.weight"),
    ("whole.pt", "wrong shape or type of conv1.weight")])
@pytest.mark.filterwarnings("error")  # one line on stderr, none of torch's beside it
def test_bad_weight_files_are_refused(imagenet_like, tmp_path, capsys, name, words):
    bad_files(tmp_path, imagenet_like.state_dict())
    models.build("resnet18", 4, str(tmp_path / "good.pt"))
    with pytest.raises(InputError, match=words):
        models.build("resnet18", 4, str(tmp_path / name))
    assert "this code ran" not in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("new", [True, False])
def test_a_file_cut_anywhere_or_of_noise_is_refused(tmp_path, new):
    whole = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": 1.5}, whole, _use_new_zipfile_serialization=new)
    path, noise = tmp_path / "x.pt", np.random.default_rng(0)
    for content in [*(whole.getvalue()[:k] for k in range(len(whole.getvalue()))),
                    *(noise.bytes(100) for _ in range(300))]:
        path.write_bytes(content)
        with pytest.raises(InputError, match="refused|truncated"):
            models.read_file(path)


@pytest.mark.parametrize(("error", "reason"), [
    (RuntimeError("first line\nsecond line"), "first line"), (EOFError(), "it is too short")])
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path, monkeypatch, error, reason):
    def broken(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch, "load", broken)
    (tmp_path / "x.pt").touch()
    with pytest.raises(InputError) as told:
        models.read_file(tmp_path / "x.pt")
    assert str(told.value) == f"{tmp_path / 'x.pt'}: truncated or no PyTorch file ({reason})"


def test_equal_content_is_equal_bytes_wherever_its_keys_came_from(tmp_path):
    """Two keys of one text, one object or two: pickle would write the second in another way."""
    key, written = "a key of some length", []
    for other in (key, "".join(key)):
        models.save({"a": {key: 1}, "b": {other: 2}}, tmp_path / "x.pt")
        written.append((tmp_path / "x.pt").read_bytes())
    assert written[0] == written[1] and other is not key


def test_moved_is_a_copy_even_to_where_it_is():
    state = {"w": torch.ones(2)}
    there = models.moved(state, "cpu")
    there["w"].zero_()
    assert state["w"].tolist() == [1, 1]


def test_an_interruption_right_after_a_file_is_in_place_is_passed_on(tmp_path, monkeypatch):
    replace = models.os.replace

    def interrupted(*args):
        replace(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(models.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.write_whole(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    models.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        models.save({"a": torch.zeros(2)}, path)
    assert torch.equal(models.read_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_device_that_is_not_there():
    with pytest.raises(InputError, match="--device cuda:99: not there"):
        models.pick_device("cuda:99")
    for name in ("abacus", "meta"):  # the latter takes tensors, and computes nothing
        with pytest.raises(InputError, match="not there"):
            models.pick_device(name)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = False, True
    assert models.pick_device("cpu") == torch.device("cpu")
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark  # repeatable,
    assert not torch.backends.cudnn.allow_tf32  # and in float32


def test_a_trunk_without_its_classifier_is_taken_and_told(capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 2, 3)
            self.classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    donor, model = Net(), Net()
    before = model.classifier[0].weight.clone()
    trunk = {k: v.half() for k, v in donor.state_dict().items() if k.startswith("features")}
    models.load_matching(model, trunk, "classifier.2", "trunk.pth")
    assert "trunk.pth: has no layer of the classifier" in capsys.readouterr().out
    assert torch.equal(model.features.weight, donor.features.weight.half().float())
    assert torch.equal(model.classifier[0].weight, before)
    models.load_matching(model, donor.state_dict(), "classifier.2", "whole.pth")
    assert equal(model.state_dict(), donor.state_dict()) and capsys.readouterr().out == ""
    part = trunk | {"classifier.0.bias": donor.classifier[0].bias.detach()}
    with pytest.raises(InputError, match="1 entries missing"):  # half a classifier is another one
        models.load_matching(model, part, "classifier.2", "part.pth")
    with pytest.raises(InputError, match="1 entries missing"):  # and the trunk must be whole
        models.load_matching(model, {"features.weight": trunk["features.weight"]}, "classifier.2",
                             "half.pth")


def test_a_full_disk_is_told_although_torch_hides_it(tmp_path):
    """Its writer closes the file after the error, and that fails in words of its own."""
    def write(file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    with pytest.raises(OSError, match="No space left"):
        models.write_whole(tmp_path / "x.pt", write)
    assert not list(tmp_path.iterdir())
