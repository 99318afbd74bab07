"""Centralised training: k-fold cross-validation, one given split, and the twin of a federated run.

    python train_central.py --data DIR                     # section 3.5: 5 folds, 40 epochs each
    python train_central.py --like runs/NAME               # split, network, seed, budget of a run
    python train_central.py --like runs/NAME --local-only  # each of its hospitals alone
    python train_central.py                                # drawn smears: minutes on two cores
"""

from checks import InputError, guard, integer, number

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import fedavg
import models
from dataset import splits
from reporting import run_folder, tables, terminal
from training import evaluation, experiment
from training.processes import Job
from training.recipe import DEMONSTRATION
from training.recipe import add_arguments as add_recipe_arguments

Part = tuple[str, splits.Split, int]  # folder in the run folder, split, client that it stands for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a centralised run."""
    add = parser.add_argument_group("centralised training").add_argument
    add("--folds", type=integer(1), default=5, help="default 5; 1 = one run on the given --split")
    add("--epochs", type=integer(1), default=40, help="of each fold (default 40)")
    add("--inner-val", type=number(0, 0.5), default=0.1,
        help="share of a fold's training part that validates; 0 = fixed epochs, the last scored")
    add("--period", type=integer(1), default=1, help="epochs between validations (default 1)")
    add("--bn", choices=("train", "freeze"), default="train", help="BatchNorm layers")
    add("--like", metavar="RUN", help="one run with the split, network, seed, recipe and budget of "
        "a federated run, validated every local-epochs epochs")
    add("--local-only", action="store_true", help="with --like: each of its clients alone, for "
        "rounds x local-epochs epochs on its own images, scored on the common test part")


GROUPS = (data.add_arguments, models.add_arguments, add_arguments, add_recipe_arguments)


def defaults(args: argparse.Namespace) -> dict:
    """Defaults of the flags that were not given: those of the run to be like, else by the data."""
    if args.like is not None:
        run = run_folder.read_run(Path(args.like))
        recorded = run["arguments"]
        if "rounds" not in recorded or recorded.get("local_only"):
            raise InputError(f"--like {args.like}: a run of {run['script']}, not a federated one")
        rounds, local_epochs = recorded["rounds"], recorded["local_epochs"]
        shared = {key: value for key, value in recorded.items() if key in vars(args)}
        return shared | {"bn": "freeze" if recorded["bn"] == "freeze" else "train", "folds": 1,
                         "epochs": rounds * local_epochs, "period": local_epochs}
    return {} if args.data else DEMONSTRATION | {"epochs": 20, "early_stop": 5}


def prepare(args: argparse.Namespace) -> tuple[experiment.Experiment, list[Part]]:
    """The experiment and the runs that it consists of, all checked before training."""
    job = Job()
    if job.world > 1:
        raise InputError("train_central.py runs in one process, not under torchrun")
    if args.like is not None and args.folds > 1:
        raise InputError("--like copies one split: --folds 1")
    if args.local_only and args.like is None:
        raise InputError("--local-only needs --like RUN, the federated run whose clients train")
    with job.preparing(args) as facts:
        run = experiment.prepare(args, job, facts)
    parts = [(name, split, 0) for name, split in run.several.items()]
    if args.like is not None:
        run.clients, names = like_clients(args, Path(args.like), run.images, run.several[""])
    if args.local_only:
        owner = {i: n for n, own in zip(names, run.clients, strict=True) for i in own.tolist()}
        run.images.known["client"] = np.array([owner.get(i, "") for i in
                                               range(len(run.images.paths))])
        parts = [(f"client{k}", run.several[""] | {"train": owned}, k)
                 for k, owned in enumerate(run.clients)]
    return run, parts


def like_clients(args: argparse.Namespace, folder: Path, images: data.Images,
                 split: splits.Split) -> tuple[list[np.ndarray], list[str]]:
    """The clients of the run to be like, and their names. A new run must have its images and its
    very split; one that is resumed knows both itself."""
    if args.resume is not None and (Path(args.resume) / "split.csv").exists():
        return tables.read_split(Path(args.resume), images)[1:]
    run_folder.check_images(folder, images)
    there, clients, names = tables.read_split(folder, images)
    if any(not np.array_equal(there[part], split[part]) for part in split):
        raise InputError(f"--like {folder}: the flags here do not give its split")
    return clients, names


def train_alone(args: argparse.Namespace, folder: Path, run: experiment.Experiment,
                split: splits.Split, start: models.State, client_id: int = 0) -> None:
    """Train from `start` on split["train"] with one lasting optimiser, epoch by epoch; then finish.

    Goes on from the folder's checkpoint; a complete run is left as it is. Draws what client
    `client_id` draws in round 1, so that one round of one client is the same run. Raises
    FloatingPointError where the weights stop being finite.
    """
    if (folder / "report.md").exists():
        return
    model, images = run.model, run.images
    measured = evaluation.Evaluation(model, images, split)
    recipe = experiment.weighted(args, run, images.class_counts(split["train"]))
    trainer = fedavg.make_optimizer(model, recipe)
    checkpoint = run_folder.start_or_resume(folder, images, split, [], make_checkpoint(
        0, models.moved(start, "cpu"), [], trainer))
    for part, key in zip(trainer, ("optimizer", "scaler"), strict=True):
        part.load_state_dict(checkpoint[key])
    model.load_state_dict(checkpoint["state"])
    history = checkpoint["history"]
    for epoch in range(len(history) + 1, args.epochs + 1):
        validated = history[args.period - 1::args.period] if len(split["val"]) else []
        if evaluation.is_stale(validated, args.early_stop):
            print(f"early stop: no better validation loss for {args.early_stop} validations")
            break
        lr = evaluation.plateau_lr(validated, args.lr, args.plateau)
        for group in trainer[0].param_groups:
            group["lr"] = lr
        began = time.perf_counter()
        with tqdm(total=args.expand * len(split["train"]), desc=f"epoch {epoch}/{args.epochs}",
                  unit="image", disable=None, leave=False) as bar:
            record = fedavg.train_local(
                model, images, split["train"], recipe, *trainer, range(epoch - 1, epoch),
                (args.seed, 1, client_id), bar.update)
        seconds = time.perf_counter() - began
        state = models.moved(model.state_dict(), "cpu")
        if not models.is_finite(state):
            raise FloatingPointError(f"epoch {epoch}: the weights are not finite")
        seen = len(split["val"]) and epoch % args.period == 0
        tally = measured.tally("val", state) if seen else [0, 0, 0.0]
        history.append(make_record(epoch, lr, record, tally, seconds))
        terminal.print_epoch(history[-1], args.epochs)
        checkpoint = make_checkpoint(epoch, state, history, trainer)
        evaluation.save_progress(folder, args, model, images.classes, checkpoint)
    from reporting import report  # here: what it needs would only delay the first epoch
    report.print_summary(folder, evaluation.finish(folder, args, measured, checkpoint))


def make_checkpoint(epoch: int, state: models.State, history: list[dict], trainer: tuple) -> dict:
    """Everything that resuming needs; optimiser and scaler are kept from epoch to epoch."""
    optimizer, scaler = (part.state_dict() for part in trainer)
    return {"epoch": epoch, "state": state, "history": history, "local_bn": {},
            "optimizer": optimizer, "scaler": scaler}


def make_record(epoch: int, lr: float, record: dict, tally: list, seconds: float) -> dict:
    """One line of history.jsonl; without a validation its figures are null."""
    return evaluation.without_nan({
        "epoch": epoch, "lr": lr, **evaluation.validation(tally), "train_loss": record["loss"],
        "train_accuracy": record["accuracy"],
        **{key: record[key] for key in ("images", "steps", "skipped_steps")},
        "seconds": seconds, "images_per_second": record["images"] / seconds})


def train_parts(args: argparse.Namespace, folder: Path, run: experiment.Experiment,
                parts: list[Part]) -> None:
    """Folds, or hospitals alone: each from the same start in a folder of its own, then pooled."""
    start = models.moved(run.model.state_dict(), "cpu")
    for name, split, client_id in parts:
        part = folder / name
        part.mkdir(exist_ok=True)
        if not (part / "run.json").exists():
            run_folder.write_run(part, args, "central", run.images, run.device, folder.name)
        print(f"---- {name}: {len(split['train'])} training, {len(split['val'])} validation, "
              f"{len(split['test'])} test images", flush=True)
        train_alone(args, part, run, split, start, client_id)
    from reporting import report
    titles = run.images.titles(run.clients) if args.local_only else []
    report.pool_folds(folder, run.images, {name: split for name, split, _ in parts},
                     {f"client{k}": title for k, title in enumerate(titles)})


def main(argv: list[str] | None = None) -> None:
    args = run_folder.parse(__doc__, GROUPS, defaults, argv)
    run, parts = prepare(args)
    folder = run_folder.begin(args, "central", run.images, run.device)
    with run_folder.resumable(folder):
        print(f"run folder: {folder}; {args.model} on {run.device}")
        data.keep_on(run.images, run.device)
        if args.local_only:
            tables.write_split(folder, run.images, run.several[""], run.clients)
            train_parts(args, folder, run, parts)
        elif args.folds > 1:
            tests = {name: split["test"] for name, split, _ in parts}
            tables.write_split(folder, run.images, tests, [])
            train_parts(args, folder, run, parts)
        else:
            train_alone(args, folder, run, run.several[""], run.model.state_dict())


if __name__ == "__main__":
    guard(main)
