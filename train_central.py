"""Centralised training: k-fold cross-validation, one given split, and the twin of a federated run.

    python train_central.py --data DIR                     # section 3.5: 5 folds, 40 epochs each
    python train_central.py --data DIR --models resnet50 vgg16 efficientnet_b0
    python train_central.py --folds 1 --like runs/NAME     # split, network, seed, budget of a run
    python train_central.py                                # synthetic smears, minutes on two cores
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

import compare
import data
import evaluation
import fedavg
import models
import run_folder
import splits
from checks import InputError, guard, integer, number, warn
from recipe import add_arguments as add_recipe_arguments
from recipe import make_recipe

# What the demonstration sets for itself where --data is not given; every flag still overrides.
DEMONSTRATION = {"model": "resnet18", "weights": "none", "image_size": 32, "batch_size": 32,
                 "lr": 1e-3, "plateau": 2, "early_stop": 5, "epochs": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("centralised training").add_argument
    add("--folds", type=integer(1), default=5, help="default 5; 1 = one run on the given --split")
    add("--epochs", type=integer(1), default=40, help="of each fold (default 40)")
    add("--inner-val", type=number(0, 0.5), default=0.1,
        help="share of a fold's training part that validates; 0 = fixed epochs, the last scored")
    add("--period", type=integer(1), default=1, help="epochs between validations (default 1)")
    add("--bn", choices=("train", "freeze"), default="train", help="BatchNorm layers")
    add("--models", nargs="+", metavar="MODEL", help="several networks in turn, then their table")
    add("--like", metavar="RUN", help="one run with the split, network, seed, recipe and budget of "
        "a federated run, validated every local-epochs epochs")


GROUPS = (data.add_arguments, models.add_arguments, add_arguments, add_recipe_arguments)


def defaults(args: argparse.Namespace) -> dict:
    """Defaults of the flags that were not given: those of the run to be like, else by the data."""
    if args.like is not None:
        run = run_folder.read_json(Path(args.like) / "run.json")
        if "rounds" not in run["arguments"]:
            raise InputError(f"--like {args.like}: a run of {run['script']}, not a federated one")
        recorded = dict(run["arguments"])
        rounds, local_epochs = recorded["rounds"], recorded["local_epochs"]
        recorded["bn"] = "freeze" if recorded["bn"] == "freeze" else "train"
        shared = {k: v for k, v in recorded.items() if k in vars(args) and k != "seeds"}
        return shared | {"folds": 1, "epochs": rounds * local_epochs, "period": local_epochs}
    chosen = {} if args.data else dict(DEMONSTRATION)
    return chosen | ({"split": "stratified"} if args.folds > 1 else {})


def prepare(args: argparse.Namespace) -> tuple:
    """Images, splits by folder name ("" is the run folder itself), the first network and the
    device, all checked before training."""
    if args.data is None:
        warn(f"SYNTHETIC DATA: no --data given. Drawn smears at {args.image_size} pixels, weights "
             f"{args.weights}, {args.epochs} epochs, batch {args.batch_size}, rate {args.lr:g}: "
             "a demonstration, not medical data")
    if args.like is not None and args.folds > 1:
        raise InputError("--like copies one split: --folds 1")
    device = models.pick_device(args.device)
    make_recipe(args, device)  # refused now rather than with a folder begun
    images = data.load(args)
    if args.folds == 1:
        several = {"": data.make_split(args, images)}
    else:
        several = {f"fold{k}": fold for k, fold in enumerate(data.make_folds(args, images), 1)}
    if args.like is not None and args.resume is None:
        check_like(Path(args.like), images, several[""])
    for name in reversed(args.models or [args.model]):  # every one is built, the first is kept
        model = models.build(name, len(images.classes), args.weights, args.seed, images.classes)
        models.check_size(model, args.image_size)
        models.freeze(model, args.train_from, batchnorm=args.bn == "freeze")
    if args.models and len(set(args.models)) < len(args.models):
        raise InputError(f"--models {' '.join(args.models)}: one of them twice")
    return images, several, model.to(device), device


def check_like(folder: Path, images: data.Images, split: splits.Split) -> None:
    """The split must be that of the run to be like, image by image."""
    there = [(row["path"], row["split"]) for row in run_folder.read_split(folder)]
    if run_folder.read_json(folder / "run.json")["fingerprint"] != images.fingerprint():
        raise InputError(f"--like {folder}: the images are not those of the run")
    parts = run_folder.part_names(split, len(images.paths))
    if there != list(zip(images.paths, parts, strict=True)):
        raise InputError(f"--like {folder}: the flags here do not give its split")


def train_alone(args: argparse.Namespace, folder: Path, images: data.Images, split: splits.Split,
                model: torch.nn.Module, start: fedavg.State, client_id: int = 0) -> None:
    """Train from `start` on split["train"] with one lasting optimiser, epoch by epoch; then finish.

    Goes on from the folder's checkpoint where there is one; a complete run is left as it is. Draws
    what client `client_id` draws in round 1, so one round of one client is the same run. Raises
    FloatingPointError where the weights stop being finite.
    """
    if (folder / "results.json").exists():
        return
    device = next(model.parameters()).device
    recipe = make_recipe(args, device)
    part = evaluation.Evaluation(model, images, split)
    weights = None if args.class_weights == "none" else fedavg.class_weights(
        images.labels.numpy()[split["train"]], len(images.classes), device)
    trainer = fedavg.make_optimizer(model, recipe, args.lr)
    checkpoint = start_or_resume(folder, images, split, start, *trainer)
    model.load_state_dict(checkpoint["state"])
    history = checkpoint["history"]
    for epoch in range(len(history) + 1, args.epochs + 1):
        validated = history[args.period - 1::args.period] if len(split["val"]) else []
        if evaluation.is_stale(validated, args.early_stop):
            print(f"early stop: no better validation loss for {args.early_stop} validations")
            break
        lr = evaluation.plateau_lr(evaluation.val_losses(validated), args.lr, args.plateau)
        for group in trainer[0].param_groups:
            group["lr"] = lr
        began = time.perf_counter()
        with tqdm(total=args.expand * len(split["train"]), desc=f"epoch {epoch}/{args.epochs}",
                  unit="image", disable=None, leave=False) as bar:
            record = fedavg.train_local(
                model, images, split["train"], recipe, *trainer, epochs=range(epoch - 1, epoch),
                seed=args.seed, round_index=1, client_id=client_id, class_weights=weights,
                progress=bar.update)
        seconds = time.perf_counter() - began
        state = models.moved(model.state_dict(), "cpu")
        if not models.is_finite(state):
            raise FloatingPointError(f"epoch {epoch}: the weights are not finite")
        val = None
        if len(split["val"]) and epoch % args.period == 0:
            val = part.measure("val", part.logits("val", state))
        history.append(make_record(epoch, lr, record, val, seconds))
        print_epoch(history[-1], args.epochs)
        optimizer, scaler = (x.state_dict() for x in trainer)
        checkpoint = {"epoch": epoch, "state": state, "history": history, "local_bn": {},
                      "optimizer": optimizer, "scaler": scaler}
        evaluation.save_progress(folder, args, model, images.classes, checkpoint)
    evaluation.finish(folder, args, part, checkpoint)


def start_or_resume(folder: Path, images: data.Images, split: splits.Split, start: fedavg.State,
                    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict:
    """The checkpoint to go on from; fills optimiser and scaler from it."""
    checkpoint = run_folder.last_checkpoint(folder)
    if checkpoint is None:
        run_folder.write_split(folder, images, split, [])
        run_folder.write_history(folder, [])
        return {"epoch": 0, "state": models.moved(start, "cpu"), "local_bn": {}, "history": []}
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint


def make_record(epoch: int, lr: float, record: dict, val: dict | None, seconds: float) -> dict:
    """One line of history.jsonl; without a validation its figures are null."""
    return {"epoch": epoch, "lr": lr, "val_loss": val and val["loss"],
            "val_accuracy": val and val["accuracy"]["value"], "train_loss": record["loss"],
            "train_accuracy": record["accuracy"], "images": record["images"],
            "steps": record["steps"], "skipped_steps": record["skipped_steps"],
            "seconds": seconds, "images_per_second": record["images"] / seconds}


def print_epoch(record: dict, epochs: int) -> None:
    val = "" if record["val_loss"] is None else (
        f"val loss {record['val_loss']:.4f}, val accuracy {record['val_accuracy']:.4f}, ")
    print(f"epoch {record['epoch']}/{epochs}: train loss {record['train_loss']:.4f}, {val}"
          f"lr {record['lr']:g}, {record['images_per_second']:.1f} images/s", flush=True)


def train_parts(args: argparse.Namespace, folder: Path, images: data.Images,
                several: dict[str, splits.Split], model: torch.nn.Module, script: str,
                argv: list[str] | None) -> None:
    """Folds or single sites: each from the same start in a folder of its own, then pooled."""
    start = models.moved(model.state_dict(), "cpu")
    device = next(model.parameters()).device
    for i, (name, split) in enumerate(several.items()):
        part = folder / name
        part.mkdir(exist_ok=True)
        if not (part / "run.json").exists():
            run_folder.write_run(part, args, script, images, device, argv, part_of=folder.name)
        print(f"---- {name}: {len(split['train'])} training, {len(split['val'])} validation, "
              f"{len(split['test'])} test images", flush=True)
        train_alone(args, part, images, split, model, start, i if script == "federated" else 0)
    evaluation.pool(folder, images, several)


def main(argv: list[str] | None = None) -> None:
    args = run_folder.parse(__doc__, GROUPS, defaults, argv)
    images, several, model, device = prepare(args)
    folder = run_folder.begin(args, "central", images, device, argv)
    with run_folder.resumable(folder, "central"):
        if args.seeds or args.models:
            flags = ("--seeds", args.seeds, "--seed") if args.seeds else (
                "--models", args.models, "--model")
            compare.write(folder, run_folder.each(main, folder, *flags))
            return
        print(f"run folder: {folder}; {args.model} on {device}")
        images.pixels = images.pixels.to(device)  # once; batches are gathered there
        if args.folds == 1:
            train_alone(args, folder, images, several[""], model, model.state_dict())
        else:
            tests = {name: split["test"] for name, split in several.items()}
            run_folder.write_split(folder, images, tests, [])
            train_parts(args, folder, images, several, model, "central", argv)


if __name__ == "__main__":
    guard(main)
