"""A trained run as a function from pixels to logits: exactly as it was evaluated, or fast.

Exact is the evaluation of training: float32, the network as it was saved. Fast folds BatchNorm into
the convolutions (torch.fx) and computes in bf16 where the device does so natively and the network
bears it: a ResNet50 does, a MobileNetV2 does not.
"""

from checks import InputError, integer, warn

import argparse
import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization

import data
import models
from dataset import interventions, synthetic
from dataset.files import CLASSES

LIMIT = 0.02  # of what half precision may do to a probability


@dataclass(frozen=True, eq=False)
class Trained:
    """A network in eval mode with what its pixels need."""
    model: nn.Module
    name: str  # torchvision's name of the architecture
    classes: list[str]
    image_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    interventions: tuple[str, ...] = ()  # that its pixels were trained with
    client: int | None = None  # whose BatchNorm it has, where every client has its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of scripts that use a trained network."""
    add = parser.add_argument_group("network").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    add("--client", type=integer(0), help="whose BatchNorm to use, of a --bn local run")


def load(folder: Path, device: torch.device, client: int | None = None) -> Trained:
    """The best model of a run folder, as it was evaluated. client: whose BatchNorm to use, in a run
    where every client has its own.

    Raises InputError for a folder without `model.pt`, and where `client` is needed or unknown."""
    if not (folder / "model.pt").exists():
        parts = sorted(p.parent.name for p in folder.glob("*/model.pt"))
        raise InputError(f"{folder}: has no model.pt" + (
            f"; it holds several runs, name one: {', '.join(parts)}" if parts else
            ", it is no trained run"))
    content = models.read_file(folder / "model.pt")
    if not {"model", "classes", "state"} <= content.keys():
        raise InputError(f"{folder}/model.pt: not a model that this project wrote")
    local_bn = content.get("local_bn", {})
    if bool(local_bn) != (client is not None) or (local_bn and client not in local_bn):
        raise InputError(f"{folder}: " + (
            f"every client has its own BatchNorm, --client must be one of {sorted(local_bn)}"
            if local_bn else "one global model, --client has no place here"))
    if unknown := set(content.get("interventions", ())) - set(interventions.INTERVENTIONS):
        raise InputError(f"{folder}: trained with an intervention unknown here: {min(unknown)}")
    model = models.build(content["model"], len(content["classes"]))
    model.load_state_dict(content["state"] | local_bn.get(client, {}))
    return Trained(model.to(device).eval(), content["model"], content["classes"],
                   content["image_size"], device, client=client,
                   interventions=tuple(content.get("interventions", ())))


def fast(trained: Trained, limit: float = LIMIT) -> Trained:
    """The same network with BatchNorm folded into its convolutions, in bf16 (on CUDA float16 where
    there is no bf16) but for its head. Where that could move a probability by more than `limit`,
    it is float32, and one line says so."""
    folded = optimization.fuse(copy.deepcopy(trained.model)).eval()
    folded = folded.to(trained.device, memory_format=torch.channels_last)
    exact = replace(trained, model=folded)
    dtype = models.pick_precision("auto", trained.device)
    if dtype is None:
        return exact
    low = copy.deepcopy(folded).to(dtype)
    head = low.get_submodule(models.head_name(low)).float()
    head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    half = replace(exact, model=low, dtype=dtype)
    moved = deviation(exact, half)
    if not moved <= limit:  # not a number either: float16 overflowed
        warn(f"note: in {dtype} a probability could be off by {moved:.2f}, so float32 is used")
        return exact
    return half


def deviation(a: Trained, b: Trained, count: int = 16) -> float:
    """The most by which any probability of `a` and `b` can differ, judged by their logits on drawn
    smears: (max d - min d) / 4 for a difference d of logits, because a step along d changes p_i by
    at most p_i (1 - p_i) (max d - min d). The smears are always the same, so that an answer does
    not depend on the images that are asked about with it."""
    drawn = np.stack([synthetic.draw_one(CLASSES[i % 4], a.image_size,
                                         np.random.default_rng(i)) for i in range(count)])
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    d = logits(a, pixels) - logits(b, pixels)
    return ((d.amax(1) - d.amin(1)) / 4).max().item()


@torch.inference_mode()
def logits(trained: Trained, pixels: Tensor) -> Tensor:
    """float32 [n, C] on the CPU, in batches. pixels: uint8 [n, 3, H, W] of the network's size."""
    out = []
    for batch in pixels.split(data.EVAL_BATCH):
        batch = data.normalise(batch.to(trained.device).float().div_(255))
        out.append(trained.model(batch.to(trained.dtype)).float().cpu())
    return torch.cat(out)


def probabilities(trained: Trained, pixels: Tensor) -> np.ndarray:
    """float32 [n, C], rows summing to 1."""
    return logits(trained, pixels).softmax(1).numpy()
