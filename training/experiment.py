"""What the flags of a trainer, or of a recorded run, describe: images, clients, network, recipe."""

from checks import InputError, warn

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import data
import fedavg
import models
from dataset import parts, splits
from reporting import run_folder
from training.processes import Job
from training.recipe import make_recipe


@dataclass(eq=False)
class Experiment:
    """Everything that training needs, checked before it begins."""
    images: data.Images
    several: dict[str, splits.Split]  # by folder: fold1, fold2, ...; one split has the name ""
    clients: dict[str, list[np.ndarray]]  # by folder, if federated: int64 training indices of each
    model: torch.nn.Module
    recipe: fedavg.Recipe
    device: torch.device


def prepare(args: argparse.Namespace, job: Job, facts: dict) -> Experiment:
    """Build and check what the flags of either trainer describe. Raises InputError.
    facts: receives what must be equal in all processes of the job."""
    if args.data is None:
        warn(f"SYNTHETIC DATA: no --data given. Drawn smears, {args.model} at {args.image_size} "
             f"pixels, weights {args.weights}, batch {args.batch_size}, rate {args.lr:g}, "
             f"plateau patience {args.plateau}: a demonstration, not medical data")
    name = args.device
    if job.world > 1 and torch.cuda.is_available() and name in ("auto", "cuda"):
        name = f"cuda:{job.local_rank % torch.cuda.device_count()}"  # a machine's GPUs in turn
    device = models.pick_device(name)
    recipe = make_recipe(args, device)
    sketch = models.build(args.model, 2)  # what does not fit is refused before any image is read
    models.freeze(sketch, args.train_from, batchnorm=args.bn == "freeze")
    if args.bn == "recalibrate" and args.train_from:
        raise InputError("--bn recalibrate would change what --train-from freezes")
    if args.bn not in ("average", "train") and not models.batchnorm_keys(sketch):
        raise InputError(f"--bn {args.bn}: {args.model} has no BatchNorm")
    models.check_size(sketch, args.image_size, args.batch_size)
    weights = args.weights
    if (resumed := vars(args).get("resume")) and (Path(resumed) / "last.pt").exists():
        weights = "none"  # the state comes from there
    elif weights not in ("none", "imagenet"):
        models.read_file(weights)
    images = data.load(args)
    parts.settle(args, images)
    several, clients = parts.make_splits(args, images), {}
    if job.folder is not None:  # a hospital with images of its own knows no others
        own, nothing = several[""]["train"], several[""]["train"][:0]
        clients[""] = [own if k == job.rank else nothing for k in range(job.world)]
    elif "clients" in args:
        clients = {name: parts.make_clients(args, images, split) for name, split in several.items()}
    model = models.build(args.model, len(images.classes), weights, args.seed, images.classes)
    models.freeze(model, args.train_from, batchnorm=args.bn == "freeze")
    if models.needs_batch(model) and any(1 in map(len, dealt) for dealt in clients.values()):
        raise InputError("a client owns one image only, too few for BatchNorm: try fewer clients")
    if job.folder is not None and (job.folder / "run.json").exists():
        run_folder.check_images(job.folder, images)
    facts |= {"the class list": images.classes, "the precision of --amp": recipe.amp_dtype}
    if job.folder is None:
        facts["the data"] = images.fingerprint()
    return Experiment(images, several, clients, model.to(device), recipe, device)


def start(args: argparse.Namespace, job: Job, folder: Path | None, run: Experiment) -> dict:
    """The checkpoint of a federated run, or its beginning, at every process. Writes the split of a
    new run, and moves the pixels to the training device, where batches are gathered."""
    (split,), (clients,) = run.several.values(), run.clients.values()
    checkpoint = {"round": 0, "state": models.moved(run.model.state_dict(), "cpu"),
                  "local_bn": {}, "history": []}
    if job.folder is not None:
        job.folder.mkdir(parents=True, exist_ok=True)
        for place, whole in ((job.folder.parent, None), (job.folder, job.folder.parent.name)):
            if not (place / "run.json").exists():
                run_folder.write_run(place, args, "federated", run.images, run.device, whole)
        run_folder.write_split(job.folder, run.images, split, clients)
    if folder is not None:
        checkpoint = run_folder.start_or_resume(folder, run.images, split, clients, checkpoint)
    data.keep_on(run.images, run.device)
    state, local_bn, history = job.share_round(
        checkpoint["state"], checkpoint["local_bn"], checkpoint["history"])
    return {"round": len(history), "history": history, "state": models.moved(state, run.device),
            "local_bn": {k: models.moved(s, run.device) for k, s in local_bn.items()}}


def open_part(args: argparse.Namespace, part: Path, run: Experiment, split: splits.Split) -> Path:
    """The folder of a part of a larger run: a fold, or a hospital alone. Says what is in it."""
    part.mkdir(parents=True, exist_ok=True)
    if not (part / "run.json").exists():
        script = "federated" if "rounds" in args else "central"
        run_folder.write_run(part, args, script, run.images, run.device, part.parent.name)
    print(f"---- {part.name}: {len(split['train'])} training, {len(split['val'])} validation, "
          f"{len(split['test'])} test images", flush=True)
    return part


def weighted(args: argparse.Namespace, run: Experiment, counts: list[int]) -> fedavg.Recipe:
    """The recipe with the class weights of eq. 3 for a training part with these class sizes."""
    weights = fedavg.class_weights(np.array(counts), run.device)
    return replace(run.recipe, class_weights=None if args.class_weights == "none" else weights)
