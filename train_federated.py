"""Federated Averaging over simulated hospitals: the paper's main experiment.

    python train_federated.py --data DIR      # the paper: 4 clients, 10 rounds x 5 local epochs
    python train_federated.py                 # embedded synthetic smears, minutes on two cores
    python train_federated.py --local-only    # each hospital alone, the same budget
    python train_federated.py --resume runs/NAME
    torchrun --nproc-per-node 2 train_federated.py ...      # clients over processes: distributed.py
"""

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import compare
import data
import evaluation
import fedavg
import models
import report
import run_folder
import splits
import train_central
from checks import InputError, guard, integer, number, warn
from recipe import add_arguments as add_recipe_arguments
from recipe import make_recipe

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
    add("--local-only", action="store_true",
        help="no averaging: each client alone for rounds x local epochs, on the common test part")
    add = parser.add_argument_group("torchrun").add_argument
    add("--timeout", type=number(0, open_low=True), default=1800.0,
        help="seconds that a process waits for another (default 1800)")
    add("--site-data", nargs="+", metavar="DIR", help="instead of --data: one client a process, "
        "each reads its own folder; those of this machine's processes, in order")
    add("--site-names", nargs="+", metavar="NAME", help="default: site0, site1, ...")
    add("--classes", nargs="+", metavar="CLASS", help="of all sites (default: the four)")
    add("--share-scores", action="store_true",
        help="sites send the probabilities of their test images too, which AUC needs")


GROUPS = (data.add_arguments, data.add_client_arguments, models.add_arguments, add_arguments,
          add_recipe_arguments)


def defaults(args: argparse.Namespace) -> dict:
    return {} if args.data or args.site_data else DEMONSTRATION


def print_round(record: dict, rounds: int) -> None:
    for c in record["clients"]:
        norm = "not finite, left out" if c["left_out"] else report.show(c["update_norm"], 3)
        name = c.get("site", f"client {c['client']}")
        print(f"  {name}: {c['num_examples']} images, {c['steps']} steps, loss "
              f"{report.show(c['loss'])}, accuracy {report.show(c['accuracy'], 3)}, update "
              f"norm {norm}, skipped {report.show(c['skipped_steps'], 0)}")
    print(f"round {record['round']}/{rounds}: val loss {report.show(record['val_loss'])}, "
          f"val accuracy {report.show(record['val_accuracy'])}, lr {record['lr']:g}, "
          f"{record['images_per_second']:.1f} images/s", flush=True)


def make_record(round_index: int, lr: float, clients: list[dict], val: dict,
                seconds: float) -> dict:
    """One line of history.jsonl. Training figures are pooled over the images of those averaged."""
    images = sum(c["images"] for c in clients)
    kept = [c for c in clients if not c["left_out"]]
    pooled = {f"train_{key}": None if kept[0][key] is None else
              sum(c[key] * c["images"] for c in kept) / sum(c["images"] for c in kept)
              for key in ("loss", "accuracy")}  # sites with their own data keep their accuracy
    clients = [{key: None if isinstance(value, float) and not np.isfinite(value) else value
                for key, value in c.items()} for c in clients]  # JSON has no NaN
    return {"round": round_index, "lr": lr, "val_loss": val["loss"],
            "val_accuracy": val["accuracy"]["value"], **pooled, "images": images,
            "steps": sum(c["steps"] for c in clients), "clients": clients,
            "seconds": seconds, "images_per_second": images / seconds}


def prepare(args: argparse.Namespace, team=None) -> tuple:
    """Images, split, clients and network that the flags describe, all checked before training.
    team: distributed.Team, under torchrun."""
    if team is None and (args.site_data or args.site_names or args.classes or args.share_scores):
        raise InputError("--site-data, --site-names, --classes and --share-scores need torchrun: "
                         "one process a site")
    if args.data is None:
        warn(f"SYNTHETIC DATA: no --data given. Drawn smears, {args.model} at {args.image_size} "
             f"pixels, weights {args.weights}, batch {args.batch_size}, rate {args.lr:g}, "
             f"plateau patience {args.plateau}: a demonstration, not medical data")
    for flag, neutral in (("mu", 0), ("fraction", 1), ("bn", "average")):
        if args.local_only and getattr(args, flag) not in (neutral, "freeze"):
            raise InputError(f"--local-only averages nothing: --{flag} has no place beside it")
    device = team.device if team else models.pick_device(args.device)
    images = data.load(args)
    split = data.make_split(args, images)
    clients = (team.own_clients(split) if team and team.sites
               else data.make_clients(args, images, split))
    model = models.build(args.model, len(images.classes), args.weights, args.seed, images.classes)
    models.check_size(model, args.image_size)
    models.freeze(model, args.train_from, batchnorm=args.bn == "freeze")
    if 1 in map(len, clients) and models.needs_batch(model):
        raise InputError("a client owns one image only, too few for BatchNorm: fewer clients, or "
                         "another --partition")
    return images, split, clients, model.to(device), device


def train_sites(args: argparse.Namespace, folder: Path, images: data.Images, split: splits.Split,
                clients: list[np.ndarray], model: torch.nn.Module, argv: list[str] | None) -> None:
    """--local-only: what each hospital reaches without the others, same start and same budget."""
    alone = argparse.Namespace(**vars(args), epochs=args.rounds * args.local_epochs,
                               period=args.local_epochs)
    run_folder.write_split(folder, images, split, clients)
    sites = {f"client{k}": {**split, "train": owned} for k, owned in enumerate(clients)}
    train_central.train_parts(alone, folder, images, sites, model, "federated", argv)


def start_or_resume(folder: Path, images: data.Images, split: splits.Split,
                    clients: list[np.ndarray], model: torch.nn.Module) -> dict:
    """The checkpoint to go on from; a new run begins with its split and starting state on disk."""
    checkpoint = run_folder.last_checkpoint(folder)
    if checkpoint is None:
        checkpoint = {"round": 0, "state": models.moved(model.state_dict(), "cpu"), "local_bn": {},
                      "history": []}
        run_folder.write_split(folder, images, split, clients)
        run_folder.write_history(folder, [])
        models.save(checkpoint, folder / "last.pt")
    return checkpoint


def main(argv: list[str] | None = None, team=None) -> None:
    args = run_folder.parse(__doc__, GROUPS, defaults, argv)
    if team:
        team.join(args)
    with team.agreement(args) if team else nullcontext({}) as facts:
        images, split, clients, model, device = prepare(args, team)
        recipe = make_recipe(args, device)
        folder = None  # of rank 0: only it writes
        if team is None or team.rank == 0:
            folder = run_folder.begin(args, "federated", images, device, argv)
        if team:
            facts |= team.facts(images) | {"the precision of --amp": recipe.amp_dtype}
    if args.seeds:
        compare.write(folder, run_folder.each(main, folder, "--seeds", args.seeds, "--seed"))
        return
    print(f"run folder: {folder}; {args.model} on {device}, "
          f"{'float32' if recipe.amp_dtype is None else f'autocast {recipe.amp_dtype}'}")
    images.pixels = images.pixels.to(device)  # once; batches are gathered there
    with run_folder.resumable(folder, "federated"):
        if args.local_only:
            train_sites(args, folder, images, split, clients, model, argv)
            return
        checkpoint = folder and start_or_resume(folder, images, split, clients, model)
        labels, classes = images.labels.numpy(), images.classes
        train_labels, run_round = labels[split["train"]], fedavg.run_round
        if team and team.sites:
            team.begin_site(args, images, split, argv)
        if team:
            checkpoint = team.begin(checkpoint, model, args.bn)
            train_labels, run_round = team.all_labels(train_labels, len(classes)), team.run_round
        shares = None if args.bn != "local" else {
            part: splits.deal_like(labels, split[part], clients, args.split_seed)
            for part in ("val", "test")}
        measured = evaluation.Evaluation(model, images, split, shares)
        weights = None if args.class_weights == "none" else fedavg.class_weights(
            train_labels, len(classes), device)
        state, history = models.moved(checkpoint["state"], device), checkpoint["history"]
        local_bn = {k: models.moved(s, device) for k, s in checkpoint["local_bn"].items()}

        for round_index in range(checkpoint["round"] + 1, args.rounds + 1):
            if evaluation.is_stale(history, args.early_stop):
                print(f"early stop: no better validation loss for {args.early_stop} rounds")
                break
            began = time.perf_counter()
            chosen = fedavg.sample_clients(args.clients, args.fraction, args.seed, round_index)
            lr = evaluation.plateau_lr(evaluation.val_losses(history), args.lr, args.plateau)
            mine = team.mine(chosen) if team else chosen
            total = args.local_epochs * args.expand * sum(len(clients[k]) for k in mine)
            with tqdm(total=total, desc=f"round {round_index}/{args.rounds}", unit="image",
                      disable=None if folder else True, leave=False) as bar:
                state, local_bn, records = run_round(
                    model, state, local_bn, chosen, clients, images, recipe, bn=args.bn, lr=lr,
                    local_epochs=args.local_epochs, class_weights=weights, seed=args.seed,
                    round_index=round_index, progress=bar.update)
            seconds = time.perf_counter() - began
            val = (team.validate(measured, state, local_bn) if team else
                   measured.measure("val", measured.logits("val", state, local_bn)))
            history.append(make_record(round_index, lr, records, val, seconds))
            print_round(history[-1], args.rounds)
            checkpoint = {"round": round_index, "state": models.moved(state, "cpu"),
                          "history": history, "local_bn": {k: models.moved(s, "cpu")
                                                           for k, s in local_bn.items()}}
            if folder:
                evaluation.save_progress(folder, args, model, classes, checkpoint)
        if team and team.sites:
            evaluation.finish_sites(team, folder, args, measured, checkpoint)
        elif folder:
            evaluation.finish(folder, args, measured, checkpoint, clients)


if __name__ == "__main__":
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # one process of a torchrun job
        import launch
        launch.launch(main)
    else:
        guard(main)
