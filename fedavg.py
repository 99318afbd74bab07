"""Federated Averaging, Algorithm 1 of McMahan et al. 2017 (arXiv 1602.05629): read this file first.

    the server keeps one global state θ                       train_federated.py, main
    each round it picks clients                               sample_clients
        each starts from θ and trains on its own images       run_round, train_local
        θ ← Σ n_k θ_k / Σ n_k, over the clients of the round  weighted_average

A state is a value: a dict of tensors in, a new dict out. What a client draws comes from (seed,
round, client, epoch) alone. `train_local` is the only training loop: central training calls it too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import models
from augment import Augmentation
from checks import InputError, warn
from models import State


@dataclass(frozen=True)
class Recipe:
    """How one client trains (Table 3 and section 3.4 of the paper)."""
    batch_size: int = 32
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    momentum: float = 0.9  # SGD only
    clip: float = 1.0  # global gradient norm, 0 = off
    label_smoothing: float = 0.0
    sampler: str = "shuffle"
    expand: int = 1  # times each image is drawn per epoch
    mu: float = 0.0  # FedProx
    augmentation: Augmentation | None = None
    amp_dtype: torch.dtype | None = None  # of autocast; None = float32


def random_keys(*parts: int) -> tuple[int, int]:
    """Two independent 63-bit seeds from (seed, round, client, epoch)."""
    first, second = np.random.SeedSequence(parts).generate_state(2, np.uint64)
    return int(first >> 1), int(second >> 1)


# ---- the server -------------------------------------------------------------------------------

def sample_clients(num_clients: int, fraction: float, seed: int, round_index: int) -> list[int]:
    """max(1, round(fraction·K)) clients, uniformly, in order. Size must not matter here: it already
    weighs the average (Algorithm 1)."""
    rng = np.random.default_rng(random_keys(seed, round_index))
    count = max(1, round(fraction * num_clients))
    return sorted(rng.choice(num_clients, count, replace=False).tolist())


@dataclass
class WeightedSum:
    """Σ n_k θ_k and Σ n_k. Float entries are unevaluated sums high + low of float64 (Knuth's
    two-sum): nothing is rounded away, so neither order nor grouping of the clients, over processes
    say, changes a bit. Integer entries (BatchNorm's counters) hold the element-wise maximum."""
    high: State = field(default_factory=dict)
    low: State = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    num_examples: int = 0

    def add(self, key: str, high: Tensor, low: Tensor | float = 0.0) -> None:
        """Add an entry, n_k θ_k or the sum of other clients; `high` may become part of this."""
        if key not in self.high:
            self.high[key], self.low[key] = high, torch.zeros_like(high) + low
        elif high.is_floating_point():
            total = self.high[key] + high
            back = total - self.high[key]
            self.low[key] += (self.high[key] - (total - back)) + (high - back) + low
            self.high[key] = total
        else:
            self.high[key] = torch.maximum(self.high[key], high)

    def mean(self) -> State:
        """θ = Σ n_k θ_k / Σ n_k, divided once and cast back. Raises ValueError for no update."""
        if self.num_examples == 0:
            raise ValueError("no update to average")
        return {key: ((high + self.low[key]) / self.num_examples).to(self.dtypes[key])
                if high.is_floating_point() else high for key, high in self.high.items()}


def weighted_sum(updates: Iterable[tuple[State, int]]) -> WeightedSum:
    """Σ n_k θ_k over (state, n_k) pairs, read one at a time: only one needs to exist.

    Every entry takes part, BatchNorm's running statistics included: note that the mean of running
    variances is not the pooled variance. Inputs are not changed. Raises ValueError for unequal
    entries, or n_k < 1.
    """
    result = WeightedSum()
    for state, num_examples in updates:
        if num_examples < 1 or num_examples != int(num_examples):
            raise ValueError(f"weight {num_examples} is not a number of images")
        result.dtypes = result.dtypes or {key: value.dtype for key, value in state.items()}
        known = {k: v.shape for k, v in result.high.items()}
        if known and {k: v.shape for k, v in state.items()} != known:
            raise ValueError("states differ in their entries or shapes")
        for key, value in state.items():
            result.add(key, value.detach().double() * int(num_examples)
                       if value.is_floating_point() else value.clone())
        result.num_examples += int(num_examples)  # of the clients of this round, not of all
    return result


def weighted_average(updates: Iterable[tuple[State, int]]) -> State:
    """θ = Σ n_k θ_k / Σ n_k over (state, n_k) pairs. Raises ValueError for no update."""
    return weighted_sum(updates).mean()


def run_round(model: nn.Module, global_state: State, local_bn: dict[int, State], chosen: list[int],
              clients: list[np.ndarray], images: data.Images, recipe: Recipe, *, bn: str, lr: float,
              local_epochs: int, class_weights: Tensor | None, seed: int, round_index: int,
              progress: Callable[[int], object] = lambda n: None,
              mean: Callable[[WeightedSum, State], State] = lambda total, like: total.mean(),
              ) -> tuple[State, dict[int, State], list[dict]]:
    """One round: (new global state, new BatchNorm states of `bn="local"`, a record per client).

    `model` is working memory: a client starts by overwriting it with the global state. An update
    that is not finite is left out, loudly, and the weights are those of the rest; raises
    FloatingPointError if none is left. mean: under torchrun, over the sums of all processes, each
    with entries as in a second state.
    """
    records: list[dict] = []
    local_bn = dict(local_bn)
    bn_keys = models.batchnorm_keys(model) if bn == "local" else []

    def updates() -> Iterable[tuple[State, int]]:
        for client_id in chosen:
            start = global_state | local_bn.get(client_id, {})
            model.load_state_dict(start)
            trainer = make_optimizer(model, recipe, lr)  # fresh: clients are stateless
            record = train_local(model, images, clients[client_id], recipe, *trainer, seed=seed,
                                 epochs=range(local_epochs), round_index=round_index,
                                 client_id=client_id, class_weights=class_weights,
                                 progress=progress)
            squares = [(parameter.detach() - start[name]).double().square().sum()
                       for name, parameter in model.named_parameters()]
            norm = torch.stack(squares).sum().sqrt().item()
            state = model.state_dict()
            finite = models.is_finite(state)
            records.append({"client": client_id, "num_examples": len(clients[client_id]), **record,
                            "update_norm": norm if finite else None, "left_out": not finite})
            if not finite:
                warn(f"round {round_index}: the update of client {client_id} is not finite and is "
                     "LEFT OUT of the average")
                continue
            if bn == "local":
                local_bn[client_id] = {key: state[key].clone() for key in bn_keys}
            yield {k: v for k, v in state.items() if k not in bn_keys}, len(clients[client_id])

    try:
        averaged = mean(weighted_sum(updates()),
                        {k: v for k, v in global_state.items() if k not in bn_keys})
    except ValueError:
        if not all(r["left_out"] for r in records):
            raise
        raise FloatingPointError(f"round {round_index}: no client's update is finite") from None
    new_state = global_state | averaged
    if bn == "recalibrate":
        device = next(model.parameters()).device
        kept = [clients[r["client"]] for r in records if not r["left_out"]]
        moments = mean(weighted_sum((models.batchnorm_moments(model, new_state, (
            data.eval_batch(images, b, device)
            for b in data.batch_slices(torch.from_numpy(k), data.EVAL_BATCH))), len(k))
            for k in kept),
            {k: v.double() for k, v in new_state.items() if k in models.moment_keys(model)})
        new_state |= models.pooled_batchnorm(new_state, moments)
    return new_state, dict(sorted(local_bn.items())), records


# ---- the client -------------------------------------------------------------------------------

def class_weights(labels: np.ndarray, num_classes: int, device: torch.device) -> Tensor:
    """w_c = n / (C · n_c) of eq. 3, float32 [C]; labels: the whole training part. 0 if absent."""
    counts = np.bincount(labels, minlength=num_classes)
    weights = (counts > 0) * len(labels) / (num_classes * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32, device=device)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None,
                           label_smoothing: float = 0.0) -> Tensor:
    """Eq. 3: Σ w_y·CE / batch size. PyTorch's weighted mean would divide by Σ w_y instead."""
    total = F.cross_entropy(logits, targets, weights, reduction="sum",
                            label_smoothing=label_smoothing)
    return total / len(targets)


def proximal_term(parameters: Iterable[Tensor], reference: Iterable[Tensor], mu: float) -> Tensor:
    """FedProx (Li et al. 2020, eq. 2): μ/2 · ||w - w_global||², over parameters only."""
    pairs = zip(parameters, reference, strict=True)
    return 0.5 * mu * torch.stack([(p - r).square().sum() for p, r in pairs]).sum()


def make_optimizer(model: nn.Module, recipe: Recipe,
                   lr: float) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    """A fresh optimiser over the trainable parameters, and the scaler that float16 needs."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    common = {"lr": lr, "weight_decay": recipe.weight_decay,
              "fused": device.type in ("cpu", "cuda")}
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=recipe.momentum, **common)
    else:
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(parameters, eps=1e-8, **common)
    return optimizer, torch.amp.GradScaler(device.type, enabled=recipe.amp_dtype == torch.float16)


def train_local(model: nn.Module, images: data.Images, indices: np.ndarray, recipe: Recipe,
                optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, epochs: range,
                seed: int, round_index: int, client_id: int, class_weights: Tensor | None = None,
                progress: Callable[[int], object] = lambda n: None) -> dict:
    """Train `model` in place on `indices`; returns images, steps, loss, accuracy, skipped steps.

    Steps: E·(⌈n/B⌉ - [n mod B = 1]). Loss and accuracy are means over the augmented images seen.
    Everything random comes from (seed, round_index, client_id, epoch); the caller's random state is
    left as it was. Raises InputError for a client of one image under BatchNorm.
    """
    if len(indices) == 1 and models.needs_batch(model):
        raise InputError(f"client {client_id} owns one image, too few for BatchNorm")
    device = next(model.parameters()).device
    reference = ([p.detach().clone() for p in model.parameters() if p.requires_grad]
                 if recipe.mu else [])
    owned, labels = torch.from_numpy(indices), images.labels[torch.from_numpy(indices)]
    all_labels = images.labels.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct; read once at the end
    seen = steps = skipped = 0
    models.train_mode(model)
    for epoch in epochs:
        order_key, dropout_key = random_keys(seed, round_index, client_id, epoch)
        generator = torch.Generator().manual_seed(order_key)
        order = data.epoch_order(labels, recipe.sampler, recipe.expand, generator,
                                 recipe.batch_size)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_key)
            for positions in data.batch_slices(order, recipe.batch_size):
                rows = owned[positions].to(device)
                batch = data.train_batch(images, rows, recipe.augmentation, generator, device)
                loss, correct, stepped = train_step(
                    model, batch, all_labels[rows], recipe, optimizer, scaler,
                    class_weights=class_weights, reference=reference)
                sums += torch.stack([loss.double() * len(rows), correct.double()])
                steps, seen, skipped = steps + 1, seen + len(rows), skipped + (not stepped)
                progress(len(rows))
    loss_sum, hits = sums.tolist()
    return {"images": seen, "steps": steps, "loss": loss_sum / seen, "accuracy": hits / seen,
            "skipped_steps": skipped}


def train_step(model: nn.Module, batch: Tensor, targets: Tensor, recipe: Recipe,
               optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *,
               class_weights: Tensor | None, reference: list[Tensor],
               ) -> tuple[Tensor, Tensor, bool]:
    """One optimiser step on one batch: (loss, correct answers, False if float16 overflowed)."""
    parameters = optimizer.param_groups[0]["params"]
    with torch.autocast(batch.device.type, recipe.amp_dtype or torch.bfloat16,
                        enabled=recipe.amp_dtype is not None):
        logits = model(batch)
    logits = logits.float()
    loss = weighted_cross_entropy(logits, targets, class_weights, recipe.label_smoothing)
    if recipe.mu:
        loss = loss + proximal_term(parameters, reference, recipe.mu)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # before clipping, or the threshold is on scaled gradients
    if recipe.clip:
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
    scale = scaler.get_scale()  # 1, without a device round trip, where nothing is scaled
    scaler.step(optimizer)
    scaler.update()
    correct = (logits.detach().argmax(1) == targets).sum()
    return loss.detach(), correct, scaler.get_scale() >= scale
