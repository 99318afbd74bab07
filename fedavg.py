"""Federated Averaging, Algorithm 1 of McMahan et al. 2017 (arXiv 1602.05629). Read this file first.

    for each round t = 1, 2, ...                          train_federated.train, the round loop
        S ← a random set of clients                       sample_clients
        for each client k in S:
            θ_k ← ClientUpdate(k, θ)                      train_client, train_local, train_step
        θ ← Σ n_k θ_k / Σ n_k, over the clients in S      accept, WeightedAverage

θ is a "state": a dictionary of tensors, as `state_dict()` returns it. No function here changes a
state that it is given. `train_local` is the only training loop of the project: central training
calls it too. Everything that a client draws at random comes from (seed, round, client, epoch).
"The paper", with its tables and eq. 3, is FedAvg-ResNet50, which this project implements.
"""

from checks import InputError, warn

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import models
from dataset.augment import Augmentation
from models import State

Key = tuple[int, int, int]  # (seed, round, client): with the epoch, all that random draws need
Progress = Callable[[int], object]  # is told how many images each step trained on


@dataclass(frozen=True, eq=False)
class Recipe:
    """How one client trains in one round (Table 3 and section 3.4 of the paper)."""
    local_epochs: int = 5
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float = 1e-4  # replaced from round to round by the schedule
    weight_decay: float = 1e-4
    momentum: float = 0.9  # used by SGD only
    clip: float = 1.0  # largest global norm of the gradient; 0 switches clipping off
    label_smoothing: float = 0.0
    sampler: str = "shuffle"
    expand: int = 1  # an epoch draws n · expand images
    mu: float = 0.0  # weight of FedProx's proximal term; 0 is FedAvg
    class_weights: Tensor | None = None  # w_c of eq. 3, float32 [C]; None weighs classes equally
    augmentation: Augmentation | None = None
    amp_dtype: torch.dtype | None = None  # precision of autocast; None is plain float32


class Update(NamedTuple):
    """What one client sends to the server after its local training."""
    client_id: int
    num_examples: int  # n_k, the training images that the client owns: its weight in the average
    state: State  # θ_k, every entry of the state dict, BatchNorm's running statistics included
    record: dict  # figures of its training, for history.jsonl


# ---- the server -------------------------------------------------------------------------------

def sample_clients(num_clients: int, fraction: float, seed: int, round_index: int) -> list[int]:
    """max(1, round(fraction · K)) clients in ascending order (Algorithm 1). Drawn uniformly: the
    size of a client is its weight in the average, and must not count twice."""
    rng = np.random.default_rng(random_keys(seed, round_index))
    count = max(1, round(fraction * num_clients))
    return sorted(rng.choice(num_clients, count, replace=False).tolist())


def accept(update: Update, records: list[dict], local_bn: dict[int, State],
           bn_keys: list[str]) -> State | None:
    """The entries of an update that enter the average; None where it is not finite. Adds a record.
    With FedBN (`bn_keys` given) BatchNorm's entries stay out: copies become local_bn[client]."""
    finite = models.is_finite(update.state)
    records.append({"client": update.client_id, "num_examples": update.num_examples,
                    **update.record, "left_out": not finite})
    if not finite:  # one NaN would spoil the average, which divides by the n_k kept
        records[-1]["update_norm"] = None
        warn(f"the update of client {update.client_id} is not finite and is LEFT OUT of the mean")
        return None
    if bn_keys:
        local_bn[update.client_id] = {key: update.state[key].clone() for key in bn_keys}
    return {key: value for key, value in update.state.items() if key not in bn_keys}


class WeightedAverage:
    """θ = Σ n_k θ_k / Σ n_k of Algorithm 1, one client at a time, no input changed.

    Float entries, BatchNorm's running statistics included, are summed in float64 in the order of
    adding and divided once. Integer entries (its counters) take the element-wise maximum."""

    def __init__(self) -> None:
        self.sums, self.dtypes, self.num_examples = {}, {}, 0

    def add(self, state: State, num_examples: int) -> None:
        """Add n_k θ_k. ValueError where n_k is no whole number ≥ 1, or entries or shapes differ."""
        if num_examples < 1 or num_examples != int(num_examples):
            raise ValueError(f"weight {num_examples} is not a number of images")
        if self.sums and {k: v.shape for k, v in state.items()} != {
                k: v.shape for k, v in self.sums.items()}:
            raise ValueError("states differ in their entries or shapes")
        for key, value in state.items():
            self.dtypes[key], total = value.dtype, self.sums.get(key)
            if not value.is_floating_point():
                self.sums[key] = value.clone() if total is None else torch.maximum(total, value)
            elif total is None:
                self.sums[key] = value.detach().to(torch.float64, copy=True).mul_(num_examples)
            else:  # in one pass: n_k θ_k of float32 is exact in float64
                total.add_(value.detach(), alpha=num_examples)
        self.num_examples += num_examples  # of the clients that were added, not of all clients

    def result(self) -> State:
        """The average, each entry in its own dtype; {} where nothing was added."""
        return {key: (value / self.num_examples if value.is_floating_point() else value)
                .to(self.dtypes[key]) for key, value in self.sums.items()}


def kept(records: list[dict]) -> list[int]:
    """The clients whose updates entered the average. Raises FloatingPointError for none."""
    clients = [record["client"] for record in records if not record["left_out"]]
    if not clients:
        raise FloatingPointError("no client's update is finite")
    return clients


# ---- the client -------------------------------------------------------------------------------

def train_client(model: nn.Module, start: State, images: data.Images, indices: np.ndarray,
                 recipe: Recipe, key: Key, progress: Progress = lambda n: None) -> Update:
    """ClientUpdate(k, θ) of Algorithm 1: train from `start` on the client's own images.

    indices: int64 [n_k] into `images`. The update's state is the memory of `model`, not a
    copy: use it before the next client trains and overwrites it. InputError as `train_local`."""
    state = model.state_dict()  # no copy: writing into it changes `model`, training changes it
    for name, value in state.items():  # load_state_dict takes three times as long
        value.copy_(start[name])
    optimizer, scaler = make_optimizer(model, recipe)  # fresh: clients keep nothing
    record = train_local(model, images, indices, recipe, optimizer, scaler,
                         range(recipe.local_epochs), key, progress)
    norms = [torch.linalg.vector_norm(state[name] - start[name], dtype=torch.float64)
             for name, _ in model.named_parameters()]
    record["update_norm"] = torch.stack(norms).norm().item()
    # n_k = images owned, not images passed (which grow with the epochs), not batches
    return Update(key[2], len(indices), state, record)


def train_local(model: nn.Module, images: data.Images, indices: np.ndarray, recipe: Recipe,
                optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, epochs: range,
                key: Key, progress: Progress = lambda n: None) -> dict:
    """Train `model` in place on `indices`; returns images, steps, loss, accuracy, skipped_steps.

    An epoch draws m = n · expand images in ⌈m/B⌉ steps. A last batch of a single image is dropped
    (65 images at B = 32 are 2 steps). Loss and accuracy are means over the augmented images seen.
    The caller's random state is left as it was. InputError for one image under BatchNorm."""
    if len(indices) == 1 and models.needs_batch(model):
        raise InputError(f"client {key[2]} owns one image, too few for BatchNorm")
    device = next(model.parameters()).device
    reference = ([p.detach().clone() for p in model.parameters() if p.requires_grad]
                 if recipe.mu else [])  # a copy: a live reference would make the term always zero
    owned, all_labels = torch.from_numpy(indices), images.labels.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, hits; read once at the end
    seen = steps = skipped = 0
    models.train_mode(model)
    for epoch in epochs:
        order_key, dropout_key = random_keys(*key, epoch)
        generator = torch.Generator().manual_seed(order_key)
        order = data.epoch_order(images.labels[owned], recipe.sampler, recipe.expand, generator,
                                 recipe.batch_size)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_key)
            for positions in data.batch_slices(order, recipe.batch_size):
                batch, rows = data.train_batch(images, owned[positions], recipe.augmentation,
                                               generator, device)
                loss, hits, stepped = train_step(model, batch, all_labels[rows], recipe, optimizer,
                                                 scaler, reference)
                sums += torch.stack([loss.double() * len(rows), hits.double()])
                steps, seen, skipped = steps + 1, seen + len(rows), skipped + (not stepped)
                progress(len(rows))
    loss_sum, hits = sums.tolist()
    return {"images": seen, "steps": steps, "loss": loss_sum / seen, "accuracy": hits / seen,
            "skipped_steps": skipped}


def train_step(model: nn.Module, batch: Tensor, targets: Tensor, recipe: Recipe,
               optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               reference: list[Tensor]) -> tuple[Tensor, Tensor, bool]:
    """One optimiser step on one batch: (loss, correct answers, False if float16 overflowed).
    batch: float32 [B, 3, H, W]; targets: int64 [B]; reference: FedProx's global weights or []."""
    parameters = optimizer.param_groups[0]["params"]
    with torch.autocast(batch.device.type, recipe.amp_dtype, enabled=recipe.amp_dtype is not None):
        logits = model(batch)
    logits = logits.float()
    loss = weighted_cross_entropy(logits, targets, recipe.class_weights, recipe.label_smoothing)
    if recipe.mu:
        loss = loss + proximal_term(parameters, reference, recipe.mu)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # before clipping: the threshold is meant for true gradients
    if recipe.clip:
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
    scale = scaler.get_scale()  # it falls where float16 overflowed and the step was skipped
    scaler.step(optimizer)
    scaler.update()
    hits = (logits.detach().argmax(1) == targets).sum()
    return loss.detach(), hits, scaler.get_scale() >= scale


def random_keys(*parts: int) -> tuple[int, int]:
    """Two independent 63-bit seeds from whole numbers such as (seed, round, client, epoch)."""
    first, second = np.random.SeedSequence(parts).generate_state(2, np.uint64)
    return int(first >> 1), int(second >> 1)


def class_weights(counts: np.ndarray, device: torch.device) -> Tensor:
    """w_c = n / (C · n_c) of eq. 3, float32 [C]; 0 for an absent class. counts: int [C], of the
    whole training part, so that every client weighs classes alike."""
    weights = (counts > 0) * counts.sum() / (len(counts) * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32, device=device)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None,
                           label_smoothing: float = 0.0) -> Tensor:
    """Eq. 3: Σ w_y · CE / batch size. logits: [B, C]; targets: int64 [B]; weights: [C] or None.
    PyTorch's weighted mean divides by Σ w_y instead; a round would not equal a central step."""
    return F.cross_entropy(logits, targets, weights, reduction="sum",
                           label_smoothing=label_smoothing) / len(targets)


def proximal_term(parameters: Iterable[Tensor], reference: Iterable[Tensor], mu: float) -> Tensor:
    """FedProx (Li et al. 2020, eq. 2): μ/2 · ||w - w_global||², over parameters only."""
    pairs = zip(parameters, reference, strict=True)
    return 0.5 * mu * torch.stack([(p - r).square().sum() for p, r in pairs]).sum()


def make_optimizer(model: nn.Module,
                   recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    """A fresh optimiser over the trainable parameters, and the gradient scaler of float16."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    special = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {"eps": 1e-8}
    optimizer = kinds[recipe.optimizer](parameters, lr=recipe.lr, weight_decay=recipe.weight_decay,
                                        fused=device.type in ("cpu", "cuda"), **special)
    return optimizer, torch.amp.GradScaler(device.type, enabled=recipe.amp_dtype == torch.float16)
