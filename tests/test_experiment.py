"""What the flags of a trainer describe: recipe, precision, device, clients, the beginning."""

from checks import InputError

import argparse
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers import BASE, CPU, equal, plain_net, toy_images

import fedavg
import models
import train_federated
from dataset import parts
from dataset.augment import Augmentation
from fedavg import Recipe
from reporting import run_folder
from training import experiment
from training.processes import Job
from training.recipe import add_recipe_arguments, make_recipe

RUN = ('{"script": "train_federated.py", "arguments": {"remove": [], "table": null}, '
       '"fingerprint": "OF"}')


def parse(*argv):
    return run_folder.parse("x", train_federated.GROUPS, train_federated.defaults, list(argv))


# ---- the recipe ---------------------------------------------------------------------------------

def test_the_recipe_of_the_paper_is_that_of_the_flags_by_default():
    """Table 3 and section 3.4 as `Recipe` has them; an optimiser's momentum is no flag."""
    plain, given = Recipe(), make_recipe(parse("--data", "x", "--amp", "off"), CPU)
    assert dataclasses.asdict(plain) == {
        "local_epochs": 5, "batch_size": 32, "optimizer": "adamw", "lr": 1e-4,
        "weight_decay": 1e-4, "momentum": 0.9, "clip": 1.0, "label_smoothing": 0.0,
        "sampler": "shuffle", "expand": 1, "mu": 0.0, "class_weights": None, "augmentation": None,
        "amp_dtype": None}
    assert dataclasses.asdict(given) == dataclasses.asdict(plain) | {
        "augmentation": dataclasses.asdict(Augmentation())}
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.lr = 1.0
    assert Recipe(class_weights=torch.ones(2)) != Recipe(class_weights=torch.ones(2))  # tensors


@pytest.mark.parametrize(("flag", "lowest", "below"), [
    ("--batch-size", "1", "0"), ("--lr", "1e-30", "0"), ("--weight-decay", "0", "-0.1"),
    ("--clip", "0", "-0.1"), ("--label-smoothing", "0", "-0.1"), ("--expand", "1", "0"),
    ("--plateau", "0", "-1"), ("--early-stop", "0", "-1"), ("--seed", "0", "-1"),
    ("--label-smoothing", "1", "1.1")])
def test_flags_of_local_training_end_where_they_mean_nothing(capsys, flag, lowest, below):
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    args = parser.parse_args([flag, lowest])
    assert getattr(args, flag[2:].replace("-", "_")) == float(lowest)
    with pytest.raises(SystemExit):
        parser.parse_args([flag, below])
    assert f"argument {flag}: {below} is outside" in capsys.readouterr().err


def test_precision_flags(monkeypatch):
    assert models.pick_precision("off", CPU) is None
    assert models.pick_precision("bf16", CPU) == torch.bfloat16
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert models.pick_precision("auto", cuda) == torch.bfloat16
    assert models.pick_precision("off", cuda) is None  # what is given is never resolved
    assert models.pick_precision("fp16", cuda) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    assert models.pick_precision("auto", cuda) == torch.float16
    names = ("avx512_bf16", "amx_tile")
    for native in itertools.product((False, True), repeat=2):
        for name, value in zip(names, native, strict=True):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda v=value: v)
        assert models.pick_precision("auto", CPU) == (torch.bfloat16 if any(native) else None)
    assert models.pick_precision("auto", torch.device("mps")) is None  # whatever the CPU can
    for name in names:  # a torch that does not tell
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported")
    assert models.pick_precision("auto", CPU) is None


def test_bf16_is_left_where_its_gradients_are_garbage(monkeypatch):
    def dtype(amp, size, device):
        return make_recipe(argparse.Namespace(
            amp=amp, image_size=size, augment="none"), torch.device(device)).amp_dtype
    monkeypatch.setattr(models, "pick_precision", lambda amp, device: torch.bfloat16)
    assert dtype("auto", 16, "cpu") is None and dtype("auto", 16, "cuda") == torch.bfloat16
    assert dtype("auto", 17, "cpu") == dtype("bf16", 17, "cpu") == torch.bfloat16
    with pytest.raises(InputError, match="over 16 pixels"):
        dtype("bf16", 16, "cpu")
    monkeypatch.setattr(models, "pick_precision", lambda amp, device: torch.float16)
    assert dtype("fp16", 16, "cpu") == torch.float16  # it is bf16 alone


def test_optimizers_of_the_paper():
    model = plain_net()
    for name, kind in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam),
                       ("sgd", torch.optim.SGD)):
        optimizer, scaler = fedavg.make_optimizer(model, Recipe(optimizer=name, lr=0.003))
        group = optimizer.param_groups[0]
        assert type(optimizer) is kind and group["lr"] == 0.003
        assert group["weight_decay"] == 1e-4 and group.get("eps", 1e-8) == 1e-8
        assert group.get("momentum", 0.9) == 0.9  # of SGD
        assert not optimizer.state and not scaler.is_enabled()


# ---- the experiment -----------------------------------------------------------------------------

@pytest.mark.parametrize(("world", "local_rank", "flag", "gpus", "expected"), [
    (4, 3, "auto", True, "cuda:1"), (4, 2, "cuda", True, "cuda:0"), (2, 1, "auto", True, "cuda:1"),
    (1, 0, "auto", True, "auto"), (1, 0, "cuda", True, "cuda"), (4, 3, "cuda:0", True, "cuda:0"),
    (4, 3, "cpu", True, "cpu"), (4, 3, "auto", False, "auto")])
def test_processes_of_one_machine_take_its_gpus_in_turn(monkeypatch, world, local_rank, flag, gpus,
                                                        expected):
    """Of two GPUs here; a device that is named, and a process alone, are left as they are."""
    def picked(name):
        raise InputError(f"picked {name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(models, "pick_device", picked)
    job = Job()
    job.world, job.local_rank = world, local_rank
    with pytest.raises(InputError, match=f"^picked {expected}$"):
        experiment.prepare(argparse.Namespace(data="x", device=flag), job, {})


@pytest.fixture
def prepared(monkeypatch):
    """`prepare` on thirty toy images, none of them read."""
    def prepare(*argv, job=None, facts=None):
        monkeypatch.setattr(experiment.data, "load", lambda args: toy_images(30, size=20))
        args = parse("--data", "x", *BASE, *argv)
        return args, experiment.prepare(args, job or Job(), {} if facts is None else facts)
    return prepare


def test_an_experiment_is_what_its_flags_say(prepared):
    facts = {}
    _, run = prepared("--seed", "3", "--clients", "2", facts=facts)
    assert list(run.several) == list(run.clients) == [""] and len(run.clients[""]) == 2
    assert sorted(np.concatenate(run.clients[""])) == sorted(run.several[""]["train"])
    assert equal(run.model.state_dict(), models.build("toynet", 3, seed=3).state_dict())
    assert models.needs_batch(run.model) and all(p.requires_grad for p in run.model.parameters())
    assert facts == {"the class list": ["c0", "c1", "c2"], "the precision of --amp":
                     run.recipe.amp_dtype, "the data": run.images.fingerprint()}
    _, frozen = prepared("--bn", "freeze", "--train-from", "conv2")
    free = {name.split(".")[0] for name, p in frozen.model.named_parameters() if p.requires_grad}
    assert free == {"conv2", "fc"}


def test_single_images_suit_frozen_batchnorm_only(prepared):
    """At 8 pixels the last map of the toy network has one value a channel."""
    alone = ("--image-size", "8", "--batch-size", "1")
    with pytest.raises(InputError, match="--batch-size 1 does not suit BatchNorm in Sequential"):
        prepared(*alone)
    prepared(*alone, "--bn", "freeze")
    prepared("--image-size", "8", "--batch-size", "2")


@pytest.mark.parametrize(("sizes", "flags", "refused"), [
    ((1, 23), (), True), ((2, 22), (), False), ((1, 23), ("--bn", "freeze"), False)])
def test_a_client_of_one_image_needs_frozen_batchnorm(prepared, monkeypatch, sizes, flags, refused):
    monkeypatch.setattr(parts, "make_clients", lambda args, images, split: [
        split["train"][:n] for n in sizes])
    if refused:
        with pytest.raises(InputError, match="a client owns one image only"):
            prepared(*flags)
    else:
        assert [len(c) for c in prepared(*flags)[1].clients[""]] == list(sizes)


def test_a_hospital_knows_its_own_images_only(prepared, tmp_path):
    job, facts = Job(), {}
    job.folder, job.rank, job.world = tmp_path, 1, 3
    _, run = prepared(job=job, facts=facts)
    assert [len(c) for c in run.clients[""]] == [0, len(run.several[""]["train"]), 0]
    assert np.array_equal(run.clients[""][1], run.several[""]["train"])
    assert set(facts) == {"the class list", "the precision of --amp"}  # its data are its own
    (tmp_path / "run.json").write_text(RUN.replace("OF", "other"))
    with pytest.raises(InputError, match="the images are not those of the run"):
        prepared(job=job)


def test_a_run_begins_at_round_0_with_a_copy_of_the_network(prepared, tmp_path):
    args, run = prepared()
    found = experiment.start(args, Job(), tmp_path, run)
    on_disk = models.read_file(tmp_path / "last.pt")
    for checkpoint in (found, on_disk):
        assert checkpoint["round"] == 0 and checkpoint["history"] == []
        assert checkpoint["local_bn"] == {} and equal(checkpoint["state"], run.model.state_dict())
    run.model.fc.bias.data.fill_(7)  # training changes the network, and must not change the start
    assert not found["state"]["fc.bias"].any()


def test_a_hospital_writes_its_run_once_however_often_it_starts(prepared, tmp_path, monkeypatch):
    written = []

    def write_run(place, args, script, images, device, whole):
        written.append((place, script, whole))
        (place / "run.json").write_text(RUN.replace("OF", images.fingerprint()))
    monkeypatch.setattr(run_folder, "write_run", write_run)
    job = Job()
    job.folder = tmp_path / "runs" / "out" / "a"
    for _ in range(2):
        args, run = prepared(job=job)
        experiment.start(args, job, None, run)
    assert written == [(job.folder.parent, "federated", None), (job.folder, "federated", "out")]
    assert (job.folder / "split.csv").exists()


@pytest.mark.parametrize("script", ["federated", "central"])
def test_a_part_of_a_run_is_opened_once_and_told_each_time(prepared, tmp_path, monkeypatch, capsys,
                                                           script):
    args, run = prepared()
    written, part = [], tmp_path / "runs" / "whole" / "fold2"
    monkeypatch.setattr(run_folder, "write_run", lambda place, args, *rest: (
        written.append((place, rest[0], rest[3])), (place / "run.json").touch()))
    if script == "central":
        del args.rounds
    capsys.readouterr()
    split = {"train": np.arange(5), "val": np.arange(3), "test": np.arange(2)}
    for _ in range(2):
        assert experiment.open_part(args, part, run, split) == part
        told = capsys.readouterr().out
        assert told == "---- fold2: 5 training, 3 validation, 2 test images\n"
    assert written == [(part, script, "whole")]


def test_class_weights_are_of_the_training_part_or_none(prepared):
    args, run = prepared()
    recipe = experiment.weighted(args, run, [3, 1, 0])
    assert recipe.class_weights.tolist() == pytest.approx([4 / 9, 4 / 3, 0])
    assert dataclasses.replace(recipe, class_weights=None).lr == run.recipe.lr == 0.01
    args.class_weights = "none"
    assert experiment.weighted(args, run, [3, 1, 0]).class_weights is None
