"""Federated Averaging over simulated hospitals: the paper's main experiment.

    python train_federated.py --data DIR      # the paper: 4 clients, 10 rounds x 5 local epochs
    python train_federated.py                 # embedded synthetic smears, minutes on two cores
    python train_federated.py --resume runs/NAME
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import fedavg
import metrics
import models
import report
import runs
import splits
from baselines import colour_only
from checks import InputError, guard, integer, number, warn

# What the demonstration sets for itself where --data is not given; every flag still overrides.
DEMONSTRATION = {"model": "resnet18", "weights": "none", "image_size": 40, "batch_size": 16,
                 "lr": 1e-3, "plateau": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("federation").add_argument
    add("--rounds", type=integer(1), default=10, help="communication rounds (default 10)")
    add("--local-epochs", type=integer(1), default=5, help="epochs per client and round")
    add("--fraction", type=number(0, 1, open_low=True), default=1.0,
        help="share of the clients drawn each round (default 1)")
    add("--mu", type=number(0), default=0.0, help="FedProx's proximal term (default 0 = FedAvg)")
    add("--bn", choices=("average", "recalibrate", "freeze", "local"), default="average",
        help="BatchNorm under averaging; local = FedBN (default average)")


class Evaluation:
    """Logits of the validation or test part under a global state.

    With `--bn local` there is no single global model: each client, its own BatchNorm in place, is
    measured on its own share, and the shares are pooled.
    """

    def __init__(self, model: torch.nn.Module, images: data.Images, split: splits.Split,
                 clients: list[np.ndarray], args: argparse.Namespace) -> None:
        self.model, self.images, self.split = model, images, split
        self.shares = {}
        if args.bn == "local":
            labels = images.labels.numpy()
            self.shares = {part: splits.deal_like(labels, split[part], clients, args.split_seed)
                           for part in ("val", "test")}

    def logits(self, part: str, state: fedavg.State, local_bn: dict) -> np.ndarray:
        """float32 [n, C] in the order of the part."""
        indices = self.split[part]
        if not self.shares:
            self.model.load_state_dict(state)
            return fedavg.predict(self.model, self.images, indices).numpy()
        pooled = np.empty((len(indices), len(self.images.classes)), np.float32)
        for client_id, share in enumerate(self.shares[part]):
            if len(share):
                self.model.load_state_dict(state | local_bn.get(client_id, {}))
                values = fedavg.predict(self.model, self.images, share).numpy()
                pooled[np.searchsorted(indices, share)] = values
        return pooled

    def measure(self, part: str, logits: np.ndarray) -> dict:
        """Pooled metrics; per client too where there are shares."""
        labels, classes = self.images.labels.numpy(), self.images.classes
        m = metrics.measure(logits, labels[self.split[part]], classes)
        if self.shares:
            rows = [np.searchsorted(self.split[part], share) for share in self.shares[part]]
            m["clients"] = [metrics.measure(logits[r], labels[self.split[part]][r], classes)
                            if len(r) else None for r in rows]
        return m


def print_round(record: dict, rounds: int) -> None:
    for c in record["clients"]:
        norm = "not finite, left out" if c["left_out"] else report.show(c["update_norm"], 3)
        print(f"  client {c['client']}: {c['num_examples']} images, {c['steps']} steps, "
              f"loss {report.show(c['loss'])}, accuracy {c['accuracy']:.3f}, update norm {norm}, "
              f"skipped {c['skipped_steps']}")
    print(f"round {record['round']}/{rounds}: val loss {report.show(record['val_loss'])}, "
          f"val accuracy {record['val_accuracy']:.4f}, lr {record['lr']:g}, "
          f"{record['images_per_second']:.1f} images/s", flush=True)


def make_record(round_index: int, lr: float, clients: list[dict], val: dict,
                seconds: float) -> dict:
    """One line of history.jsonl. Training figures are pooled over the images of those averaged."""
    images = sum(c["images"] for c in clients)
    kept = [c for c in clients if not c["left_out"]]
    pooled = {f"train_{key}": sum(c[key] * c["images"] for c in kept)
              / sum(c["images"] for c in kept) for key in ("loss", "accuracy")}
    clients = [{key: None if isinstance(value, float) and not np.isfinite(value) else value
                for key, value in c.items()} for c in clients]  # JSON has no NaN
    return {"round": round_index, "lr": lr, "val_loss": val["loss"],
            "val_accuracy": val["accuracy"]["value"], **pooled, "images": images,
            "steps": sum(c["steps"] for c in clients), "clients": clients,
            "seconds": seconds, "images_per_second": images / seconds}


def moved(state: fedavg.State, device: torch.device | str) -> fedavg.State:
    return {key: value.to(device) for key, value in state.items()}


def val_losses(history: list[dict]) -> list[float]:
    """Validation loss of each round so far; an undefined one (null) is the worst."""
    return [np.inf if r["val_loss"] is None else r["val_loss"] for r in history]


def best_round(history: list[dict]) -> int:
    """Round of the lowest validation loss, the earliest on ties."""
    return history[int(np.argmin(val_losses(history)))]["round"]


def finish(folder: Path, args: argparse.Namespace, evaluation: Evaluation, clients: list,
           checkpoint: dict) -> None:
    """After training: the test part, for the first time; predictions, results, figures, report."""
    images, split = evaluation.images, evaluation.split
    best = models.read_file(folder / "model.pt")
    history = checkpoint["history"]
    results = {"data": images.name, "synthetic": args.data is None,
               "fingerprint": images.fingerprint(), "model": args.model,
               "images_seen": sum(r["images"] for r in history),
               "optimizer_steps": sum(r["steps"] for r in history),
               "seconds": sum(r["seconds"] for r in history)}
    logits = {}
    for name, source in (("last", checkpoint), ("best", best)):
        if name == "last" or best["round"] != checkpoint["round"]:
            logits = {part: evaluation.logits(part, source["state"], source["local_bn"])
                      for part in ("val", "test")}
            measured = {part: evaluation.measure(part, logits[part]) for part in logits}
        results[name] = {"round": source["round"], **measured}
    labels = images.labels.numpy()
    results["colour_only"] = colour_only(images, split)
    runs.write_predictions(folder, images, split, logits)
    runs.write_json(folder / "results.json", results)
    test = results["best"]["test"]
    report.plot_history(history, best["round"], folder / "history.png")
    report.plot_confusion(test["confusion"], images.classes, "best model, test",
                          folder / "confusion.png")
    report.plot_roc(logits["test"], labels[split["test"]], images.classes, test["per_class"],
                    folder / "roc.png")
    report.plot_clients(labels, clients, images.classes, folder / "clients.png")
    twins = splits.count_twins(images.digests, split["test"], split["train"])
    runs.write_text(folder / "report.md", report.report_page(
        folder, runs.read_json(folder / "run.json"), results, twins))
    report.print_summary(results)
    print(f"report: {folder}/report.md")


def save_round(folder: Path, args: argparse.Namespace, model: torch.nn.Module,
               classes: list[str], checkpoint: dict) -> None:
    """model.pt if the round is the best so far, a line of history, last.pt: in this order, so that
    a kill in between only repeats the round."""
    if best_round(checkpoint["history"]) == checkpoint["round"]:
        models.save(models.bundle(
            model, checkpoint["state"], args.model, classes, local_bn=checkpoint["local_bn"],
            round=checkpoint["round"], image_size=args.image_size, mean=data.IMAGENET_MEAN,
            std=data.IMAGENET_STD), folder / "model.pt")
    runs.append_history(folder, checkpoint["history"][-1])
    models.save(checkpoint, folder / "last.pt")


def prepare(args: argparse.Namespace) -> tuple:
    """Images, split, clients and network that the flags describe, all checked before training."""
    if args.data is None:
        warn(f"SYNTHETIC DATA: no --data given. Drawn smears, {args.model} at {args.image_size} "
             f"pixels, weights {args.weights}, batch {args.batch_size}, rate {args.lr:g}, "
             f"plateau patience {args.plateau}: a demonstration, not medical data")
    device = models.pick_device(args.device)
    images = data.load(args)
    split, clients = data.make_split(args, images)
    model = models.build(args.model, len(images.classes), args.weights, args.seed, images.classes)
    models.check_size(model, args.image_size)
    models.freeze(model, args.train_from, batchnorm=args.bn == "freeze")
    if min(map(len, clients)) == 1 and models.needs_batch(model):
        raise InputError("a client owns one image only, too few for BatchNorm: fewer clients, or "
                         "another --partition")
    return images, split, clients, model.to(device), device


def main(argv: list[str] | None = None) -> None:
    args = runs.parse(__doc__, (data.add_arguments, models.add_arguments, add_arguments,
                                fedavg.add_arguments), DEMONSTRATION, argv)
    images, split, clients, model, device = prepare(args)
    recipe = fedavg.make_recipe(args, device)
    if args.resume is None:
        folder, checkpoint = runs.create(args, "federated", images, device, argv), None
    else:
        folder = Path(args.resume)
        checkpoint = runs.resume(folder, images, device)
    if checkpoint is None:
        start = {key: value.clone() for key, value in model.state_dict().items()}
        checkpoint = {"round": 0, "state": moved(start, "cpu"), "local_bn": {}, "history": []}
        runs.write_split(folder, images, split, clients)
        runs.write_history(folder, [])
        models.save(checkpoint, folder / "last.pt")
    print(f"run folder: {folder}; {args.model} on {device}, "
          f"{'float32' if recipe.amp_dtype is None else f'autocast {recipe.amp_dtype}'}")
    evaluation = Evaluation(model, images, split, clients, args)
    images.pixels = images.pixels.to(device)  # once; batches are gathered there
    weights = None if args.class_weights == "none" else fedavg.class_weights(
        images.labels.numpy()[split["train"]], len(images.classes), device)
    state, history = moved(checkpoint["state"], device), checkpoint["history"]
    local_bn = {k: moved(s, device) for k, s in checkpoint["local_bn"].items()}

    try:
        for round_index in range(checkpoint["round"] + 1, args.rounds + 1):
            if args.early_stop and history and \
                    history[-1]["round"] - best_round(history) >= args.early_stop:
                print(f"early stop: no better validation loss for {args.early_stop} rounds")
                break
            began = time.perf_counter()
            chosen = fedavg.sample_clients(args.clients, args.fraction, args.seed, round_index)
            lr = fedavg.plateau_lr(val_losses(history), args.lr, args.plateau)
            total = args.local_epochs * args.expand * sum(len(clients[k]) for k in chosen)
            with tqdm(total=total, desc=f"round {round_index}/{args.rounds}", unit="image",
                      disable=None, leave=False) as bar:
                state, local_bn, records = fedavg.run_round(
                    model, state, local_bn, chosen, clients, images, recipe, bn=args.bn, lr=lr,
                    local_epochs=args.local_epochs, class_weights=weights, seed=args.seed,
                    round_index=round_index, progress=bar.update)
            seconds = time.perf_counter() - began
            val = evaluation.measure("val", evaluation.logits("val", state, local_bn))
            history.append(make_record(round_index, lr, records, val, seconds))
            print_round(history[-1], args.rounds)
            checkpoint = {"round": round_index, "state": moved(state, "cpu"), "history": history,
                          "local_bn": {k: moved(s, "cpu") for k, s in local_bn.items()}}
            save_round(folder, args, model, images.classes, checkpoint)
        finish(folder, args, evaluation, clients, checkpoint)
    except KeyboardInterrupt:
        warn(f"\nstopped; go on with: python train_federated.py --resume {folder}")
        raise SystemExit(130) from None
    except FloatingPointError as error:
        warn(f"{error}; the state of round {checkpoint['round']} is kept in {folder}/last.pt")
        raise SystemExit(1) from None


if __name__ == "__main__":
    guard(main)
