"""Federated Averaging over simulated hospitals: the paper's main experiment.

    python train_federated.py --data DIR      # the paper: 4 clients, 10 rounds x 5 local epochs
    python train_federated.py                 # drawn smears instead of images: minutes on two cores
    python train_federated.py --resume runs/NAME
    torchrun --nproc-per-node 2 train_federated.py ...      # clients spread over processes

`train` is the round loop. For what each hospital reaches alone: train_central.py --local-only.
"""

from checks import integer, number

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import fedavg
import models
from dataset import parts
from reporting import run_folder, terminal
from training import evaluation, experiment, processes
from training.recipe import DEMONSTRATION, add_recipe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a federated run."""
    add = parser.add_argument_group("federation").add_argument
    add("--rounds", type=integer(1), default=10, help="communication rounds (default 10)")
    add("--local-epochs", type=integer(1), default=5, help="epochs of a client in a round (5)")
    add("--fraction", type=number(0, 1, open_low=True), default=1.0,
        help="share of the clients that is drawn each round (default 1)")
    add("--mu", type=number(0), default=0.0, help="FedProx's proximal term (default 0 = FedAvg)")
    add("--bn", choices=("average", "recalibrate", "freeze", "local"), default="average",
        help="BatchNorm under averaging; local is FedBN (default average)")
    add = parser.add_argument_group("torchrun").add_argument
    add("--timeout", type=number(0, 1e9, open_low=True), default=1800.0,
        help="seconds that a process waits for another (default 1800)")
    add("--site-data", nargs="+", metavar="NAME=DIR", help="instead of --data: every process is a "
        "hospital that reads its own folder; one NAME=DIR for each process of this machine")
    add("--classes", nargs="+", metavar="CLASS", help="of all hospitals (default: the four)")
    parser.set_defaults(folds=1)


GROUPS = (data.add_arguments, parts.add_client_arguments, parts.add_fold_arguments,
          models.add_arguments, add_arguments, add_recipe_arguments)


def defaults(args: argparse.Namespace) -> dict:
    return {} if args.data or args.site_data else DEMONSTRATION


def train(args: argparse.Namespace, job: processes.Job, folder: Path | None,
          run: experiment.Experiment) -> None:
    """The round loop of Algorithm 1, from the last checkpoint on, then the test part.

    Every process of a job runs these lines. Rank 0 is the server: it averages and writes `folder`
    (a hospital: `job.folder`). Raises FloatingPointError where no update of a round is finite."""
    checkpoint = experiment.start(args, job, folder, run)  # round 0, or where --resume goes on
    state, local_bn, history = checkpoint["state"], checkpoint["local_bn"], checkpoint["history"]
    model, images = run.model, run.images
    (split,), (clients,) = run.several.values(), run.clients.values()  # a run has one split here
    measurable = {name: job.part(indices) for name, indices in split.items()}  # in this process
    counts = job.total("counts", images.class_counts(measurable["train"]))
    first_recipe = experiment.weighted(args, run, counts)
    bn_keys = models.batchnorm_keys(model) if args.bn == "local" else []
    # FedBN has a model for each client, measured on images with that client's class mix
    shares = {name: parts.deal_part(args, images, measurable[name], clients)
              for name in ("val", "test") if args.bn == "local"}
    evaluator = evaluation.Evaluation(model, images, measurable, shares)

    def client_update(k: int) -> fedavg.Update:  # ClientUpdate(k, θ), in the round that runs below
        start = state | local_bn.get(k, {})  # FedBN: with the client's own BatchNorm entries
        return fedavg.train_client(model, start, images, clients[k], recipe,
                                   (args.seed, round_index, k), bar.update)

    for round_index in range(checkpoint["round"] + 1, args.rounds + 1):
        if evaluation.is_stale(history, args.early_stop):  # checked first, for resumed runs
            print(f"early stop: no better validation loss for {args.early_stop} rounds")
            break
        began = time.perf_counter()
        chosen = fedavg.sample_clients(args.clients, args.fraction, args.seed, round_index)
        recipe = replace(first_recipe, lr=evaluation.plateau_lr(history, args.lr, args.plateau))
        average, records = fedavg.WeightedAverage(), []
        with progress_bar(args, folder, clients, job.mine(chosen), round_index) as bar:
            for update in job.collect(chosen, client_update, like=state):  # in client order
                entries = fedavg.accept(update, records, local_bn, bn_keys)
                if entries is not None:  # None: not finite, left out
                    average.add(entries, update.num_examples)  # n_k θ_k joins the sum
        state = state | average.result()  # θ ← Σ n_k θ_k / Σ n_k, over the clients of this round
        state, local_bn, records = job.share_round(state, local_bn, records)  # from rank 0 to all
        kept = fedavg.kept(records)  # raises where no update was finite
        if args.bn == "recalibrate":
            state = recalibrate(job, model, state, images, clients, kept)
        seconds = time.perf_counter() - began
        tally = job.total("tally", evaluator.tally("val", state, local_bn))
        history.append(make_record(round_index, recipe.lr, records, tally, seconds))
        terminal.print_round(history[-1], args.rounds, images.titles(clients))
        checkpoint = {"round": round_index, "state": models.moved(state, "cpu"), "history": history,
                      "local_bn": {k: models.moved(s, "cpu") for k, s in local_bn.items()}}
        if folder is not None:
            evaluation.save_progress(folder, args, model, images.classes, checkpoint)
    evaluation.finish_job(job, folder, args, evaluator, checkpoint, clients)


def recalibrate(job: processes.Job, model: torch.nn.Module, state: models.State,
                images: data.Images, clients: list[np.ndarray], kept: list[int]) -> models.State:
    """`state` with the BatchNorm statistics of the averaged network itself: every client runs its
    own training images, unaugmented, through it, and the moments are pooled."""
    def moments(k: int) -> fedavg.Update:  # mixed: the indices are in order of class
        mixed = torch.from_numpy(np.random.default_rng(k).permutation(clients[k]))
        found = models.batchnorm_moments(model, state, (
            data.eval_batch(images, rows, next(model.parameters()).device)
            for rows in data.batch_slices(mixed, data.EVAL_BATCH)))
        return fedavg.Update(k, len(clients[k]), found, {})
    average = fedavg.WeightedAverage()
    like = {key: state[key].double() for key in models.batchnorm_keys(model)
            if key.endswith(("running_mean", "running_var"))}
    for update in job.collect(kept, moments, like):
        average.add(update.state, update.num_examples)
    return job.share("state", state | models.pooled_batchnorm(state, average.result()))


def progress_bar(args: argparse.Namespace, folder: Path | None, clients: list[np.ndarray],
                 mine: list[int], round_index: int) -> tqdm:
    """Counts the images that this process passes in a round; shown by the one that writes."""
    total = args.local_epochs * args.expand * sum(len(clients[k]) for k in mine)
    return tqdm(total=total, desc=f"round {round_index}/{args.rounds}", unit="image", leave=False,
                disable=None if folder else True)


def make_record(round_index: int, lr: float, records: list[dict], tally: list,
                seconds: float) -> dict:
    """One line of history.jsonl. Training figures are pooled over the images of those averaged;
    they are null where a hospital keeps them to itself."""
    kept = [c for c in records if not c["left_out"]]
    pooled = {f"train_{key}": None if kept[0][key] is None else
              sum(c[key] * c["images"] for c in kept) / sum(c["images"] for c in kept)
              for key in ("loss", "accuracy")}
    return evaluation.make_record({"round": round_index, "lr": lr}, tally, {
        **pooled, "images": sum(c["images"] for c in records),
        "steps": sum(c["steps"] for c in records),
        "clients": [evaluation.without_nan(c) for c in records]}, seconds)


def train_folds(args: argparse.Namespace, job: processes.Job, folder: Path | None,
                run: experiment.Experiment) -> None:
    """Cross-validation: every fold a whole run from the same start; then predictions are pooled."""
    start = models.moved(run.model.state_dict(), "cpu")
    for name, split in run.several.items():
        fold = folder and experiment.open_part(args, folder / name, run, split)
        run.model.load_state_dict(start)
        one = replace(run, several={name: split}, clients={name: run.clients[name]})
        train(args, job, fold, one)
    if folder is not None:
        from reporting import report
        report.pool_folds(folder, run.images, {k: [s] for k, s in run.several.items()}, {})


def main(argv: list[str] | None = None, job: processes.Job | None = None) -> None:
    args, job = run_folder.parse(__doc__, GROUPS, defaults, argv), job or processes.Job()
    job.join(args)
    with job.preparing(args) as facts:
        run = experiment.prepare(args, job, facts)
        folder = None if job.rank else run_folder.begin(args, "federated", run.images, run.device)
    precision = f"autocast {run.recipe.amp_dtype}" if run.recipe.amp_dtype else "float32"
    print(f"run folder: {folder}; {args.model} on {run.device}, {precision}")
    with run_folder.resumable(folder):
        if args.folds == 1:
            train(args, job, folder, run)
        else:
            train_folds(args, job, folder, run)


if __name__ == "__main__":
    processes.start(main)
