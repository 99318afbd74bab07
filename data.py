"""Images on disk → one uint8 tensor, decoded once; batches on the training device.

As a script it describes a data set without training:

    python data.py --data DIR          # counts, splits, clients, duplicates, a contact sheet
    python data.py                     # the same of the embedded synthetic smears, in seconds
"""

from checks import InputError, guard, integer, make_parser, warn

import argparse
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from dataset import interventions, parts, synthetic, table
from dataset.augment import Augmentation, augment, draw_parameters
from dataset.cache import Cache
from dataset.files import Found, decode_all, find_images, say_passed
from dataset.images import Images
from models import write_whole

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # section 3.2.2
SAMPLERS = ("shuffle", "balanced", "dual")
EVAL_BATCH = 64  # memory only (of --bn recalibrate, the batches of its statistics)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of images and split, shared by every script that reads images."""
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="one folder per class; without it: synthetic smears")
    add("--image-size", type=integer(8), default=224, help="side in pixels (default 224)")
    add("--cache", metavar="DIR", help="keep decoded pixels in files there, for the next start; "
        "the set may be larger than memory")
    add("--skip-bad", action="store_true", help="go on without unreadable images, and record which")
    add("--remove", nargs="+", choices=interventions.INTERVENTIONS, default=[], metavar="SHORTCUT",
        help="take a shortcut away from every image: scale-bar paints its corner over, colour "
        "makes the mean of the three channels equal")
    table.add_arguments(add)
    parts.add_arguments(parser)


# ---- reading ----------------------------------------------------------------------------------

def check_memory(count: int, size: int) -> None:
    """Raise InputError where this machine cannot hold `count` images of size × size pixels."""
    if hasattr(os, "sysconf"):  # not on Windows, where the error comes later
        need, has = 3 * count * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > has:
            raise InputError(
                f"--image-size {size}: {count} images x 3 x {size}² bytes are {need / 2**30:,.0f} "
                f"GiB of memory, and this machine has {has / 2**30:,.0f} (--cache holds them on "
                "disk)")


def read_folder(root: str, size: int, skip_bad: bool = False, classes: list[str] | None = None,
                listed: table.Table | None = None, skip_unlisted: bool = False,
                removed: Sequence[str] = (), cache: str | None = None) -> Images:
    """Decode every image under `root` once, in parallel, and resize it to size × size.
    classes: the class list of a federation, of which a hospital may lack some; by default the
    classes that are found. listed: a table, which decides what belongs to the set. removed: the
    interventions; digests, and so the fingerprint, are those of the images before. cache: a folder.
    Raises InputError for a missing, empty or one-class folder, and for unreadable images, naming
    all of them; with `skip_bad` they are left out and listed in `bad`."""
    there = find_images(Path(root), classes, listed is not None and "label" in listed.columns)
    if listed is not None:
        there = table.apply(listed, there, skip_unlisted, classes)
    there = there.by_class()
    if not cache:
        check_memory(len(there.files), size)
    store = Cache(cache, there.files, size, list(removed)) if cache else None
    images = _collect(there, decode_all(there.files, size), size, removed,
                      Path(root).resolve().name, store, classes)
    images.root = there.base
    if images.bad and not skip_bad:
        names = "; ".join(f"{name} ({reason})" for name, reason in images.bad)
        raise InputError(f"{len(images.bad)} unreadable image(s), --skip-bad goes on without: "
                         f"{names}")
    for name in sorted(set(there.labels)):
        if images.classes.index(name) not in images.labels:
            raise InputError(f"class {name} has no readable image")
    return images


def _collect(there: Found, decoded: Iterator, size: int, removed: Sequence[str], name: str,
             store: Cache | None = None, classes: list[str] | None = None) -> Images:
    """One data set of what was decoded, in the order of `there.files`; the rest is `bad`."""
    paths = [path.relative_to(there.base).as_posix() for path in there.files]
    names = list(classes or sorted(set(there.labels)))
    pixels, notes = (store and store.read()) or _decode(decoded, len(paths), size, removed, store)
    good, digests, shapes, bad = (notes[key] for key in ("good", "digests", "shapes", "bad"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cache cannot be written to, and nobody does
        pixels = torch.from_numpy(pixels)
    labels = torch.tensor([names.index(there.labels[i]) for i in good])
    return Images(pixels.permute(0, 3, 1, 2), labels, [paths[i] for i in good], names, digests,
                  name, ignored=there.ignored, bad=[(paths[i], why) for i, why in bad],
                  found=Counter(map(tuple, shapes)),
                  known={c: np.array([v[i] for i in good]) for c, v in there.known.items()})


def _decode(decoded: Iterator, n: int, size: int, removed: Sequence[str],
            store: Cache | None) -> tuple[np.ndarray, dict]:
    """Pixels uint8 [good, size, size, 3] after the interventions, and what is noted of the images:
    numbers of the good ones, their digests and shapes, and [number, reason] of the bad ones."""
    pixels = np.empty((n, size, size, 3), np.uint8) if store is None else store.create()
    notes = {"good": [], "digests": [], "shapes": [], "bad": []}
    for i, result in enumerate(tqdm(decoded, "decoding", n, disable=None, unit="image",
                                    leave=False)):
        if isinstance(result, str):
            notes["bad"].append([i, result])
            continue
        small, digest, shape = result
        if removed:
            image = torch.from_numpy(small.copy()).permute(2, 0, 1)[None]
            small = interventions.apply(image, removed)[0].permute(1, 2, 0)
        pixels[len(notes["good"])] = small
        for key, value in (("good", i), ("digests", digest), ("shapes", shape)):
            notes[key].append(value)
    good = len(notes["good"])
    return pixels[:good] if store is None else store.finish(pixels, good, notes), notes


def load(args: argparse.Namespace) -> Images:
    """The data set that the flags name, --data DIR or the drawn smears, after --remove."""
    listed, removed = table.chosen(args), interventions.chosen(args)
    if args.data is not None:
        if not args.data:
            raise InputError("--data: an empty name")
        images = read_folder(args.data, args.image_size, args.skip_bad,
                             getattr(args, "classes", None), listed, args.skip_unlisted,
                             removed, getattr(args, "cache", None))
        if images.ignored:
            warn(f"--data: passed over {say_passed(images.ignored)}")
        if images.bad:
            warn(f"--skip-bad: {len(images.bad)} unreadable image(s) left out: "
                 + ", ".join(name for name, _ in images.bad))
        return images
    check_memory(sum(synthetic.COUNTS.values()), args.image_size)
    drawn, labels, paths = synthetic.draw(args.image_size)
    there = Found(Path(), [Path(path) for path in paths], labels, {})
    if listed is not None:
        there = table.apply(listed, there, args.skip_unlisted, None)
    there, pixels = there.by_class(), dict(zip(paths, drawn, strict=True))
    shape = args.image_size, args.image_size, "RGB"
    decoded = ((p, hashlib.sha256(p).hexdigest(), shape) for p in (
        pixels[file.as_posix()] for file in there.files))
    return _collect(there, decoded, args.image_size, removed, "synthetic")


# ---- batches ----------------------------------------------------------------------------------

def epoch_order(labels: Tensor, sampler: str, expand: int, generator: torch.Generator,
                batch_size: int) -> Tensor:
    """Positions 0..n-1 in the order of one epoch, int64 [n·expand].

    shuffle: every image `expand` times. balanced: drawn with replacement, classes equally likely.
    dual: the first half of each batch from the shuffled order, the second half drawn balanced (our
    reading of the paper's "dual-input generator", section III)."""
    n = len(labels)
    order = torch.randperm(n * expand, generator=generator) % n
    if sampler == "shuffle":
        return order
    weights = 1.0 / torch.bincount(labels)[labels]
    drawn = torch.multinomial(weights, n * expand, replacement=True, generator=generator)
    natural = torch.arange(n * expand) % batch_size < batch_size // 2
    return drawn if sampler == "balanced" else torch.where(natural, order, drawn)


def batch_slices(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Consecutive batches. A last batch of one image is dropped: BatchNorm cannot use it."""
    for batch in order.split(batch_size):
        if len(batch) > 1 or batch_size == 1 or len(order) == 1:
            yield batch


def keep_on(images: Images, device: torch.device) -> None:
    """Move the pixels to the training device, where batches are then gathered. On a GPU only if
    they take at most half of its free memory; else they stay, and one line says so."""
    if device.type == "cuda" and images.pixels.device != device and (
            images.pixels.numel() > torch.cuda.mem_get_info(device)[0] // 2):
        warn(f"note: the pixels ({images.pixels.numel() / 2**30:.1f} GiB) stay in main memory, as "
             f"{device} has too little; batches are copied one by one")
        return
    images.pixels = images.pixels.to(device)


def gather(images: Images, indices: Tensor, device: torch.device) -> Tensor:
    """Copies of the images as float [n, 3, H, W] in 0..1 on `device`. indices: int64 [n], on the
    device of the pixels. From main memory to a GPU the copy is pinned, so that it does not wait."""
    stored = images.pixels.permute(0, 2, 3, 1)  # contiguous rows: one copy per image
    rows = stored[indices]
    if rows.device != device:
        rows = (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)
    return rows.permute(0, 3, 1, 2).float().div_(255)


@lru_cache
def imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (section 3.2.2), float32 [1, 3, 1, 1], once on each device."""
    with torch.inference_mode(False):  # or a gradient could not pass by them later
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1)
                     for values in (IMAGENET_MEAN, IMAGENET_STD))


def normalise(batch: Tensor) -> Tensor:
    """ImageNet mean and standard deviation (section 3.2.2); returns channels_last."""
    mean, std = imagenet(batch.device)
    return ((batch - mean) / std).contiguous(memory_format=torch.channels_last)


def train_batch(images: Images, indices: Tensor, ranges: Augmentation | None,
                generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """A gathered, augmented and normalised batch, for training only: validation and test images
    never come through here. indices: int64 [n] on the CPU; returned on `device` beside the batch.
    They and all that is drawn for the batch reach the device in one copy."""
    drawn = {} if ranges is None else draw_parameters(len(indices), ranges, generator)
    packed = torch.stack([indices.double(), *(values.double() for values in drawn.values())])
    if device.type == "cuda":
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)  # float64 holds either kind exactly
    rows, drawn = packed[0].long(), dict(zip(drawn, packed[1:].float(), strict=True))
    batch = gather(images, rows if images.pixels.device == device else indices, device)
    return normalise(augment(batch, drawn) if drawn else batch), rows


def eval_batch(images: Images, indices: Tensor, device: torch.device) -> Tensor:
    """A gathered and normalised batch; indices: int64 [n] on the CPU. Nothing in it is random."""
    return normalise(gather(images, indices.to(images.pixels.device), device))


# ---- as a script ------------------------------------------------------------------------------

def describe(args: argparse.Namespace, images: Images) -> None:
    """Print what is in the data set, the split and the clients."""
    print(f"{images.name}: {len(images.paths)} images, fingerprint {images.fingerprint()[:16]}")
    for (width, height, mode), count in images.found.most_common(5):
        print(f"  {count} of {width}x{height} {mode}")
    if len(images.found) > 5:  # a list of thousands helps nobody
        areas = sorted(images.found, key=lambda shape: shape[0] * shape[1])
        small, middle, large = (f"{areas[i][0]}x{areas[i][1]}" for i in (0, len(areas) // 2, -1))
        print(f"  and {len(images.found) - 5} more sizes; smallest {small}, median {middle}, "
              f"largest {large}")
    print(f"  passed over: {say_passed(images.ignored)}; {len(images.bad)} unreadable")
    for path, reason in images.bad:
        print(f"  unreadable: {path} ({reason})")
    parts.settle(args, images)
    split = parts.make_splits(args, images)[""]
    clients = parts.make_clients(args, images, split)
    rows = [("all", np.arange(len(images.paths))), *split.items(),
            *zip(images.titles(clients), clients, strict=True)]
    width = max(map(len, [*images.classes, str(len(images.paths))])) + 2
    print(f"{'part':<12}{'images':>8}" + "".join(f"{c:>{width}}" for c in images.classes))
    for name, part in rows:
        print(f"{name:<12}{len(part):>8}"
              + "".join(f"{c:>{width}}" for c in images.class_counts(part)))


def contact_sheet(images: Images, path: Path, columns: int = 8) -> None:
    """Per class one row: the first image, then augmented draws of it. Local use only."""
    rows = []
    for c in range(len(images.classes)):
        first = int((images.labels == c).nonzero()[0])
        batch = gather(images, torch.full((columns,), first), torch.device("cpu"))
        generator = torch.Generator().manual_seed(c)
        drawn = augment(batch, draw_parameters(columns, Augmentation(), generator))
        drawn[0] = batch[0]
        rows.extend(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: save_image(rows, file, "PNG", nrow=columns, padding=0))
    print(f"contact sheet (first column as read, the rest augmented): {path}")


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parts.add_client_arguments(parser)
    parser.add_argument("--sheet", metavar="PNG", help="default runs/data-NAME.png")
    args = parser.parse_args()
    if args.sheet and os.path.exists(args.sheet):
        raise InputError(f"--sheet {args.sheet}: exists already")
    args.skip_bad = True  # a description lists the unreadable ones and goes on
    images = load(args)
    describe(args, images)
    contact_sheet(images, Path(args.sheet or f"runs/data-{images.name}.png"))


if __name__ == "__main__":
    guard(main)
