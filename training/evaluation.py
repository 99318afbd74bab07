"""Selection on validation, and the one look at the test part: the same for both trainers."""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax

import data
import models
from dataset import interventions, splits
from reporting import run_folder


@torch.no_grad()
def predict(model: torch.nn.Module, images: data.Images, indices: np.ndarray) -> torch.Tensor:
    """Logits float32 [n, C] on the CPU, in eval mode and full precision. No weight changes."""
    device = next(model.parameters()).device
    model.eval()
    batches = torch.from_numpy(indices).split(data.EVAL_BATCH)
    return torch.cat([model(data.eval_batch(images, b, device)).float() for b in batches]).cpu()


class Evaluation:
    """Logits of the validation or test part under a state.
    `shares`: with `--bn local` there is no single global model: each client, its own BatchNorm in
    place, is measured on its own share of a part, and the shares are pooled."""

    def __init__(self, model: torch.nn.Module, images: data.Images, split: splits.Split,
                 shares: dict[str, list[np.ndarray]] | None = None) -> None:
        self.model, self.images, self.split, self.shares = model, images, split, shares or {}

    def logits(self, part: str, state: models.State, local_bn: dict | None = None) -> np.ndarray:
        """float32 [n, C] in the order of the part."""
        indices = self.split[part]
        pooled = np.empty((len(indices), len(self.images.classes)), np.float32)
        for client_id, share in enumerate(self.shares.get(part, [indices])):
            if len(share):
                self.model.load_state_dict(state | (local_bn or {}).get(client_id, {}))
                values = predict(self.model, self.images, share).numpy()
                pooled[np.searchsorted(indices, share)] = values
        return pooled

    def tally(self, part: str, state: models.State, local_bn: dict | None = None) -> list:
        """[n, correct answers, sum of losses]: enough for selection, and sums over processes."""
        labels = self.images.labels.numpy()[self.split[part]]
        logits = self.logits(part, state, local_bn).astype(np.float64)
        losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
        return [len(labels), int((logits.argmax(1) == labels).sum()), float(losses.sum())]


# ---- selection, schedule, stopping: functions of the history ------------------------------------

def make_record(when: dict, tally: list, training: dict, seconds: float) -> dict:
    """One line of history.jsonl. What is not finite, or not validated, is None (in JSON null)."""
    n, hits, loss = tally
    return without_nan({
        **when, "val_loss": loss / n if n else None, "val_accuracy": hits / n if n else None,
        **training, "seconds": seconds, "images_per_second": training["images"] / seconds})


def without_nan(record: dict) -> dict:
    """The record with None for figures that are not finite: JSON has no NaN."""
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in record.items()}


def val_losses(history: list[dict]) -> list[float]:
    """Validation losses so far. A round without a defined loss counts as infinitely bad."""
    return [np.inf if r["val_loss"] is None else r["val_loss"] for r in history]


def best_index(history: list[dict]) -> int:
    """Place of the lowest validation loss, the earliest on ties; the last where none is defined."""
    losses = val_losses(history)
    return int(np.argmin(losses)) if np.isfinite(losses).any() else len(losses) - 1


def is_stale(history: list[dict], patience: int) -> bool:
    """Whether to stop early: the last `patience` validations (0 = never stop) were not better."""
    return 0 < patience <= len(history) - 1 - best_index(history)


def plateau_lr(history: list[dict], lr: float, patience: int = 5, factor: float = 0.2,
               min_lr: float = 1e-6) -> float:
    """The learning rate after this history: ReduceLROnPlateau (Table 3) as a function.
    Unlike there, it stays while no loss was defined: nothing is known, as without validation."""
    best, bad = np.inf, 0
    for loss in val_losses(history) if patience else []:
        best, bad = (loss, 0) if loss < best * (1 - 1e-4) else (best, bad + (best < np.inf))
        if bad > patience:
            lr, bad = min(lr, max(lr * factor, min_lr)), 0
    return lr


# ---- progress and end of a run ------------------------------------------------------------------

def bundle(args: argparse.Namespace, model: torch.nn.Module, classes: list[str],
           checkpoint: dict) -> dict:
    """The content of model.pt: loads with weights_only=True, and suffices for new images."""
    unit, head = run_folder.unit_of(checkpoint), models.head_name(model)
    return {"state": {key: value.cpu() for key, value in checkpoint["state"].items()},
            "model": args.model, "classes": list(classes),
            "head": [f"{head}.weight", f"{head}.bias"], "local_bn": checkpoint["local_bn"],
            "image_size": args.image_size, "mean": data.IMAGENET_MEAN, "std": data.IMAGENET_STD,
            "interventions": interventions.chosen(args), unit: checkpoint[unit]}


def save_progress(folder: Path, args: argparse.Namespace, model: torch.nn.Module,
                  classes: list[str], checkpoint: dict) -> None:
    """Write model.pt if the state is the best so far, then a line of history, then last.pt: in this
    order, a kill in between only makes the round or epoch be repeated."""
    history = checkpoint["history"]
    if best_index(history) == len(history) - 1:
        models.save(bundle(args, model, classes, checkpoint), folder / "model.pt")
    run_folder.append_history(folder, history[-1])
    models.save(checkpoint, folder / "last.pt")


def finish(folder: Path, args: argparse.Namespace, evaluation: Evaluation, checkpoint: dict,
           clients: list[np.ndarray] | None = None) -> dict:
    """After training: measure the test part, for the first time; write predictions, results and the
    report. The best model is read from model.pt. Returns what results.json holds."""
    from reporting import report  # here: what it needs would only delay the first round
    images, split = evaluation.images, evaluation.split
    best = models.read_file(folder / "model.pt")
    history, unit = checkpoint["history"], run_folder.unit_of(checkpoint)
    results = {"data": images.name, "synthetic": args.data is None,
               "fingerprint": images.fingerprint(), "model": args.model}
    logits = {}
    for name, source in (("last", checkpoint), ("best", best)):
        results[name] = {unit: source[unit]}
        logits[name] = logits["last"] if name == "best" and best[unit] == checkpoint[unit] else {
            part: evaluation.logits(part, source["state"], source["local_bn"])
            for part in ("val", "test") if len(split[part])}
    return report.write_run(folder, results, history, images, split, evaluation.shares, logits,
                            clients)


def finish_job(job, folder: Path | None, args: argparse.Namespace, evaluation: Evaluation,
               checkpoint: dict, clients: list[np.ndarray]) -> None:
    """The end of a federated run, at every process of its job (`processes.Job`): the server
    finishes the run. Hospitals with images of their own each finish a run of their own on their
    own test part, and the server pools what they may tell: confusion matrices and losses."""
    from reporting import report
    if not job.sites:
        if folder is not None:
            report.print_summary(folder, finish(folder, args, evaluation, checkpoint, clients))
        return
    best = best_index(checkpoint["history"]) + 1
    lead = checkpoint if folder is None else models.read_file(folder / "model.pt")
    state = job.share("state", lead["state"])
    models.save(bundle(args, evaluation.model, evaluation.images.classes,
                       checkpoint | {"round": best, "state": state}), job.folder / "model.pt")
    own = finish(job.folder, args, evaluation, checkpoint)
    told = {which: {part: job.exchange("confusion", [own[which][part][key] for key in
                                                     ("confusion", "n", "loss")])
                    for part in ("val", "test")} for which in ("last", "best")}
    if folder is not None:
        pooled = {key: own[key] for key in report.NETWORK} | {"data": ", ".join(job.sites),
                                                                "sites": job.sites} | {
            which: {"round": own[which]["round"]} for which in told}
        report.write_sites(folder, pooled, told, checkpoint["history"], evaluation.images.classes)
