"""What a GPU would run: copies and reads of a step, counted anywhere; the rest where one is."""

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, BNNet, clone, equal, toy_images
from torch.overrides import TorchFunctionMode, resolve_name

import data
import fedavg
import models
from dataset.augment import Augmentation

BLOCKING = ("to", "item", "tolist", "cpu", "numpy", "cuda", "pin_memory", "__bool__", "__float__",
            "__int__")  # of Tensor; each would be a copy, or wait for the device


def needs_gpu(test):
    """Skip the test where conftest.py found no GPU; where there is one, let the code see it."""
    skip = pytest.mark.skipif(not torch.cuda.is_initialized(), reason="needs a CUDA device")
    return pytest.mark.usefixtures("gpu")(skip(test))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


class Count(TorchFunctionMode):
    """Counts calls that copy between host and device, or make the host wait for it. Of torch's own
    calls of `to` there are some to the same device, which do nothing: clip_grad_norm_ makes one a
    parameter; they are left out."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or getattr(function, "__name__", "")).split(".")[-1]
        own = Path(torch.__file__).parent not in Path(sys._getframe(1).f_code.co_filename).parents
        if name in BLOCKING and (own or name != "to") or function is torch.tensor:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def epoch(n, **fields):
    """The calls of one epoch over n images in batches of four."""
    images, model = toy_images(n, size=16), BNNet()
    recipe = fedavg.Recipe(batch_size=4, augmentation=Augmentation(), clip=1.0, **fields)
    trainer = fedavg.make_optimizer(model, recipe)
    data.imagenet(CPU)
    with Count() as count:
        fedavg.train_local(model, images, np.arange(n), recipe, *trainer, range(1), (0, 1, 0))
    return count.calls


@pytest.mark.parametrize("fields", [{}, {"mu": 0.1}, {"amp_dtype": torch.bfloat16},
                                    {"class_weights": torch.ones(3), "optimizer": "sgd"}])
def test_a_step_copies_once_and_reads_nothing_back(fields):
    short, long = epoch(8, **fields), epoch(48, **fields)
    assert long - short == Counter({"to": 10})  # ten steps more, one copy each
    assert short["tolist"] == 1 and short["item"] <= 1  # the sums, once at the end


def test_the_count_can_fail():
    with Count() as count:
        x = torch.ones(2).to("cpu").sum()
        assert bool(x > 0) and x.item() == 2 and torch.tensor(3).tolist() == 3
    assert count.calls == {"to": 1, "__bool__": 1, "item": 1, "tensor": 1, "tolist": 1}


def test_pixels_that_stay_behind_are_gathered_there():
    """The meta device stands for a GPU whose memory is too small: rows come from main memory."""
    images = toy_images(6)
    batch = data.gather(images, torch.tensor([4, 1]), torch.device("meta"))
    assert batch.device.type == "meta" and batch.shape == (2, 3, 8, 8)
    data.keep_on(images, CPU)
    assert torch.equal(data.gather(images, torch.tensor([4, 1]), CPU),
                       images.pixels[[4, 1]].float() / 255)


# ---- on a GPU -----------------------------------------------------------------------------------

def step(dtype, device="cuda", scale=1.0):
    """(loss, parameters after one step, whether it was taken) from the same start and batch."""
    model = BNNet().to(device, memory_format=torch.channels_last).train()
    model.drop.p = 0.0
    images = toy_images(8, size=16)
    recipe = fedavg.Recipe(batch_size=8, amp_dtype=dtype, optimizer="sgd", lr=0.1, clip=0)
    optimizer, scaler = fedavg.make_optimizer(model, recipe)
    batch = data.eval_batch(images, torch.arange(8), torch.device(device)) * scale
    loss, _, taken = fedavg.train_step(model, batch, images.labels.to(device), recipe, optimizer,
                                       scaler, [])
    return loss.item(), clone(dict(model.named_parameters())), taken


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_steps_stay_near_float32(dtype, bound):
    loss, exact, _ = step(None)
    near, half, taken = step(dtype)
    assert taken and abs(near - loss) < bound
    assert max((half[k] - exact[k]).abs().max().item() for k in exact) < bound


@needs_gpu
def test_an_overflowed_float16_step_is_skipped_and_counted():
    before = dict(BNNet().cuda().named_parameters())
    _, after, taken = step(torch.float16, scale=1e6)
    assert not taken and all(torch.equal(before[k], after[k]) for k in before)


@needs_gpu
def test_batches_keep_channels_last_and_a_client_trains_alike_from_either_memory():
    images, model = toy_images(12, size=16), BNNet().cuda()
    start = clone(model.state_dict())
    recipe = fedavg.Recipe(batch_size=4, local_epochs=2, lr=0.01)
    device = torch.device("cuda", 0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        stay = fedavg.train_client(model, start, images, np.arange(12), recipe, (0, 1, 0))
        stay = clone(stay.state)
        data.keep_on(images, device)
        assert images.pixels.is_cuda
        batch, rows = data.train_batch(images, torch.arange(4), Augmentation(),
                                       torch.Generator().manual_seed(0), device)
        assert batch.is_contiguous(memory_format=torch.channels_last) and rows.is_cuda
        moved = fedavg.train_client(model, start, images, np.arange(12), recipe, (0, 1, 0))
        assert equal(stay, moved.state)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("free", "stays"), [(2**32, False), (2**32 - 1, True)])
def test_pixels_go_to_a_gpu_if_they_take_half_of_its_free_memory_at_most(monkeypatch, capsys, free,
                                                                         stays):
    images, gpu = toy_images(2), torch.device("cuda", 0)
    images.pixels = SimpleNamespace(numel=lambda: 2**31, to=lambda device: SimpleNamespace(
        device=device, numel=lambda: 2**31), device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**33))
    data.keep_on(images, gpu)
    assert (images.pixels.device != gpu) == stays
    assert ("the pixels (2.0 GiB) stay in main memory" in capsys.readouterr().err) == stays
    if not stays:  # the next fold finds them there, and less memory free
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**31, 2**33))
        images.pixels.to = lambda device: images.pixels
        data.keep_on(images, gpu)
        assert images.pixels.device == gpu and capsys.readouterr().err == ""


@needs_gpu
def test_a_set_that_does_not_fit_stays_in_main_memory_with_one_line(monkeypatch, capsys):
    images = toy_images(12)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (images.pixels.numel(), 0))
    data.keep_on(images, torch.device("cuda", 0))
    assert images.pixels.device == CPU and "stay in main memory" in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_device_has_its_number_as_tensors_name_it(name):
    """To a plain "cuda", pixels on cuda:0 seemed to lie elsewhere; they cannot be pinned."""
    images, device = toy_images(6), models.pick_device(name)
    there = data.eval_batch(images, torch.arange(4), device)
    data.keep_on(images, device)
    assert images.pixels.device == device
    assert torch.equal(there, data.eval_batch(images, torch.arange(4), device))


@needs_gpu
def test_a_resumed_run_gives_the_same_bytes(tmp_path, monkeypatch):
    from helpers import BASE, same_run, write_tree

    import train_federated
    from training import evaluation
    tree = write_tree(tmp_path / "set", {"a": 20, "b": 20})
    flags = ["--data", str(tree), *BASE, "--device", "cuda"]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train_federated.main([*flags, "--out", str(tmp_path / "whole")])
        save, rounds = evaluation.save_progress, []

        def stop(*a):
            save(*a)
            rounds.append(a)
            if len(rounds) == 1:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "save_progress", stop)
            with pytest.raises(SystemExit):
                train_federated.main([*flags, "--out", str(tmp_path / "stopped")])
        train_federated.main(["--resume", str(tmp_path / "stopped")])
        assert same_run(tmp_path / "whole", tmp_path / "stopped")
    finally:
        torch.use_deterministic_algorithms(False)
