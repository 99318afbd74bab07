"""Centralised training: k-fold cross-validation, one given split, and the twin of a federated run.

    python train_central.py --data DIR                     # section 3.5: 5 folds, 40 epochs each
    python train_central.py --like runs/NAME               # split, network, seed, budget of a run
    python train_central.py --like runs/NAME --local-only  # each of its hospitals alone
    python train_central.py                                # drawn smears: minutes on two cores
"""

from checks import InputError, guard, integer, warn

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import fedavg
import models
from dataset import parts, splits
from reporting import run_folder, terminal
from training import evaluation, experiment
from training.processes import Job
from training.recipe import DEMONSTRATION, add_recipe_arguments

Parts = dict[str, dict[str, splits.Split]]  # by client ("" for all together), then by fold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a centralised run."""
    add = parser.add_argument_group("centralised training").add_argument
    add("--epochs", type=integer(1), default=40, help="of each fold (default 40)")
    add("--period", type=integer(1), default=1, help="epochs between validations (default 1)")
    add("--bn", choices=("train", "freeze"), default="train", help="BatchNorm layers")
    add("--like", metavar="RUN", help="one run with the split, network, seed, recipe and budget of "
        "a federated run (images passed), validated every local-epochs epochs")
    add("--local-only", action="store_true", help="with --like: each of its clients alone, for "
        "rounds x local-epochs epochs on its own images, scored on the common test part")
    parser.set_defaults(folds=5)


GROUPS = (data.add_arguments, parts.add_fold_arguments, models.add_arguments, add_arguments,
          add_recipe_arguments)


def defaults(args: argparse.Namespace) -> dict:
    """Defaults of the flags that were not given: those of the run to be like, else by the data."""
    if args.like is not None:
        run = run_folder.read_run(Path(args.like))
        recorded = run["arguments"]
        sites = recorded.get("site_data") and not run["part_of"]  # of which no folder holds all
        if "rounds" not in recorded or recorded.get("local_only") or sites:
            raise InputError(f"--like {args.like}: a run of {run['script']}, not a federated one "
                             "whose images are all in one folder")
        local_epochs, clients = recorded["local_epochs"], recorded["clients"]
        drawn = max(1, round(recorded["fraction"] * clients))  # clients of each round
        share = 1 if args.local_only else drawn / clients  # of the images, that a round passes
        epochs = max(1, round(recorded["rounds"] * local_epochs * share))
        shared = {key: value for key, value in recorded.items() if key in vars(args)}
        return {"folds": 1} | shared | {
            "bn": "freeze" if recorded["bn"] == "freeze" else "train",
            "epochs": epochs, "period": local_epochs}
    return {} if args.data else DEMONSTRATION | {"epochs": 20, "early_stop": 5}


def prepare(args: argparse.Namespace) -> tuple[experiment.Experiment, Parts, list[str]]:
    """The experiment, the runs that it consists of, and the names of clients that train alone; all
    checked before training."""
    job = Job()
    if job.world > 1:
        raise InputError("train_central.py runs in one process, not under torchrun")
    if args.local_only and args.like is None:
        raise InputError("--local-only needs --like RUN, the federated run whose clients train")
    args.period = min(args.period, args.epochs)  # at least the last epoch validates
    # a resumed run knows by its own split.csv all that --like was needed for
    itself = args.folds == 1 and args.resume is not None and Path(args.resume, "split.csv").exists()
    recorded = {} if args.like is None or itself else run_folder.read_run(
        Path(args.like))["arguments"]
    if recorded and args.folds != recorded.get("folds", 1):
        raise InputError(f"--like {args.like}: --folds is {recorded.get('folds', 1)} there")
    run = experiment.prepare(args, job, {})
    if args.like is None:
        return run, {"": run.several}, []
    several: Parts = {}
    for fold, split in run.several.items():
        if itself:
            run.clients[fold], names = run_folder.read_split(Path(args.resume), run.images)[1:]
        else:  # a new run must have the images of the run to be like, and its very split
            run_folder.check_images(Path(args.like) / fold, run.images)
            run.clients[fold], names = run_folder.check_split(Path(args.like) / fold, run.images,
                                                              split)
        for k, owned in enumerate(run.clients[fold]):
            several.setdefault(f"client{k}", {})[fold] = split | {"train": owned}
    say_differences(args, recorded)
    if not args.local_only:
        return run, {"": run.several}, []
    if args.folds == 1:
        owner = {i: n for n, own in zip(names, run.clients[""], strict=True) for i in own.tolist()}
        run.images.known["client"] = np.array([owner.get(i, "") for i in
                                               range(len(run.images.paths))])
    return run, several, names


def say_differences(args: argparse.Namespace, recorded: dict) -> None:
    """One line for each flag that was given beside --like, and so is not that of the run."""
    derived = ("data", "out", "device", "bn", "epochs", "period", "like", "resume", "local_only")
    for name, value in recorded.items():
        if name in vars(args) and name not in derived and getattr(args, name) != value:
            warn(f"note: --{name.replace('_', '-')} is {getattr(args, name)}, and {value} in "
                 f"{args.like}")


def train_alone(args: argparse.Namespace, folder: Path, run: experiment.Experiment,
                split: splits.Split, start: models.State, client_id: int = 0) -> None:
    """Train from `start` on split["train"] with one lasting optimiser, epoch by epoch; then finish.

    Goes on from the folder's checkpoint; a complete run is left as it is. Draws what client
    `client_id` draws in round 1, so that one round of one client is the same run. Raises
    FloatingPointError where the weights stop being finite."""
    if (folder / "report.md").exists():
        return
    model, images = run.model, run.images
    evaluator = evaluation.Evaluation(model, images, split)
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
        trainer[0].param_groups[0]["lr"] = lr
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
        tally = evaluator.tally("val", state) if epoch % args.period == 0 else [0, 0, 0.0]
        history.append(evaluation.make_record({"epoch": epoch, "lr": lr}, tally, {
            "train_loss": record["loss"], "train_accuracy": record["accuracy"],
            **{key: record[key] for key in ("images", "steps", "skipped_steps")}}, seconds))
        terminal.print_epoch(history[-1], args.epochs)
        checkpoint = make_checkpoint(epoch, state, history, trainer)
        evaluation.save_progress(folder, args, model, images.classes, checkpoint)
    from reporting import report  # here: what it needs would only delay the first epoch
    report.print_summary(folder, evaluation.finish(folder, args, evaluator, checkpoint))


def make_checkpoint(epoch: int, state: models.State, history: list[dict], trainer: tuple) -> dict:
    """Everything that resuming needs; optimiser and scaler are kept from epoch to epoch."""
    optimizer, scaler = (part.state_dict() for part in trainer)
    return {"epoch": epoch, "state": state, "history": history, "local_bn": {},
            "optimizer": optimizer, "scaler": scaler}


def train_parts(args: argparse.Namespace, folder: Path, run: experiment.Experiment, parts: Parts,
                names: list[str]) -> None:
    """Folds, or hospitals alone: each from the same start in a folder of its own, then pooled."""
    from reporting import report
    start = models.moved(run.model.state_dict(), "cpu")
    for client_id, (client, folds) in enumerate(parts.items()):
        place = folder / client
        if client and args.folds > 1:  # a hospital alone, in every fold: with results of its own
            place = experiment.open_part(args, place, run, next(iter(folds.values())))
        for fold, split in folds.items():
            part = experiment.open_part(args, place / fold, run, split)
            train_alone(args, part, run, split, start, client_id)
        if args.folds > 1:
            report.pool_folds(place, run.images, {k: [s] for k, s in folds.items()}, {})
    if "" not in parts:
        titles = [f"client {name}" if name.isdecimal() else name for name in names]
        report.pool_folds(folder, run.images, {k: list(f.values()) for k, f in parts.items()},
                          dict(zip(parts, titles, strict=True)))


def main(argv: list[str] | None = None) -> None:
    args = run_folder.parse(__doc__, GROUPS, defaults, argv)
    run, parts, names = prepare(args)
    folder = run_folder.begin(args, "central", run.images, run.device)
    with run_folder.resumable(folder):
        print(f"run folder: {folder}; {args.model} on {run.device}")
        data.keep_on(run.images, run.device)
        if args.local_only and args.folds == 1:
            run_folder.write_split(folder, run.images, run.several[""], run.clients[""])
        if args.local_only or args.folds > 1:
            train_parts(args, folder, run, parts, names)
        else:
            train_alone(args, folder, run, run.several[""], run.model.state_dict())


if __name__ == "__main__":
    guard(main)
