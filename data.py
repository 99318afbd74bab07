"""Images on disk → one uint8 tensor, decoded once; batches on the training device.

As a script it describes a data set without training:

    python data.py --data DIR          # counts, splits, clients, duplicates, a contact sheet
    python data.py                     # the same of the embedded synthetic smears, in seconds

Reads any tree with one folder per class. The two public layouts of the ALL set are recognised, and
their class names mapped to Benign, Early, Pre, Pro.
"""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checks import InputError, guard, integer, make_parser, number, warn
from dataset import interventions, splits, synthetic
from dataset.augment import Augmentation, augment, draw_parameters
from dataset.files import CLASSES, decode_all, find_class_folders, find_files, say_passed
from models import write_whole

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # section 3.2.2
SAMPLERS = ("shuffle", "balanced", "dual")
EVAL_BATCH = 64  # memory only: float32 evaluation does not depend on it


@dataclass(eq=False)  # compared by identity, so that lru_cache can hold features computed from it
class Images:
    """A decoded data set. pixels: uint8 [N, 3, H, W], stored channels last; labels: int64 [N]."""
    pixels: Tensor
    labels: Tensor
    paths: list[str]  # relative to the data folder, "/" between parts
    classes: list[str]
    digests: list[str]  # sha256 of each image's decoded RGB pixels and size, before resizing
    name: str
    root: Path | None = None  # the folder that the paths are relative to
    ignored: Counter = field(default_factory=Counter)  # files that were passed over, by suffix
    bad: list[tuple[str, str]] = field(default_factory=list)  # (path, reason), with --skip-bad
    found: Counter = field(default_factory=Counter)  # (width, height, mode) as found on disk

    def array(self) -> np.ndarray:
        """The pixels as uint8 [N, H, W, 3] on the CPU."""
        return self.pixels.permute(0, 2, 3, 1).cpu().numpy()

    def class_counts(self, indices: np.ndarray) -> list[int]:
        """How many of these images each class has."""
        return np.bincount(self.labels.numpy()[indices], minlength=len(self.classes)).tolist()

    def fingerprint(self) -> str:
        """sha256 over class list, paths, labels and pixel digests: equal for equal data only."""
        lines = [repr(self.classes)] + [f"{p}\t{y}\t{d}" for p, y, d in zip(
            self.paths, self.labels.tolist(), self.digests, strict=True)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of data, split and clients, shared by every script that reads images."""
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="one folder per class; without it: synthetic smears")
    add("--image-size", type=integer(8), default=224, help="side in pixels (default 224)")
    add("--skip-bad", action="store_true", help="go on without unreadable images, and record which")
    interventions.add_arguments(parser)
    add = parser.add_argument_group("split").add_argument
    add("--split", choices=splits.SPLITS, default="random", help="default: random 80/10/10")
    add("--split-seed", type=integer(0), default=42, help="seed of split and partition")
    add("--groups", metavar="CSV", help="path,group rows for --split grouped (default: duplicates)")


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that deal the training part to clients."""
    add = parser.add_argument_group("clients").add_argument
    add("--clients", type=integer(1), default=4, help="number of hospitals (default 4)")
    add("--partition", choices=splits.PARTITIONS, default="iid", help="default: iid, equal sizes")
    add("--alpha", type=number(0, open_low=True), default=0.3, help="of the Dirichlet partitions")
    add("--classes-per-client", type=integer(1), default=2, help="of --partition shards")


# ---- reading ----------------------------------------------------------------------------------

def check_memory(count: int, size: int) -> None:
    """Raise InputError where this machine cannot hold `count` images of size × size pixels."""
    if hasattr(os, "sysconf"):  # not on Windows, where the error comes later
        need, has = 3 * count * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > has:
            raise InputError(
                f"--image-size {size}: {count} images x 3 x {size}² bytes are {need / 2**30:,.0f} "
                f"GiB of memory, and this machine has {has / 2**30:,.0f}")


def read_folder(root: str, size: int, skip_bad: bool = False,
                classes: list[str] | None = None) -> Images:
    """Decode every image under `root` once, in parallel, and resize it to size × size.
    classes: the class list of a federation, of which a hospital may lack some; by default the
    classes that are found. Raises InputError for a missing, empty or one-class folder, and for
    unreadable images, naming all of them; with `skip_bad` they are left out and listed in `bad`."""
    folders = find_class_folders(Path(root), classes)
    names = list(classes or folders)
    base = next(iter(folders.values())).parent
    visited = {os.path.realpath(base), *map(os.path.realpath, folders.values())}
    if len(visited) <= len(folders):
        raise InputError(f"--data {base}: one folder under two names, by a link")
    files, labels = [], []
    ignored = Counter(p.suffix or p.name for p in base.iterdir() if p.is_file())
    for name, folder in folders.items():
        label, (found, passed) = names.index(name), find_files(folder, visited)
        if not found:
            raise InputError(f"--data: class folder {folder} has no image in it")
        files, labels, ignored = files + found, labels + [label] * len(found), ignored + passed
    paths = [path.relative_to(base).as_posix() for path in files]
    check_memory(len(files), size)
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    digests, shapes, bad, keep = [""] * len(files), Counter(), [], []
    for i, result in enumerate(tqdm(decode_all(files, size), "decoding", len(files), disable=None,
                                    unit="image", leave=False)):
        if isinstance(result, str):
            bad.append((paths[i], result))
        else:
            pixels[i], digests[i], shape = result
            shapes[shape] += 1
            keep.append(i)
    if bad and not skip_bad:
        listed = "; ".join(f"{name} ({reason})" for name, reason in bad)
        raise InputError(f"{len(bad)} unreadable image(s), --skip-bad goes on without: {listed}")
    pixels = torch.from_numpy(pixels[keep] if bad else pixels)
    images = Images(pixels.permute(0, 3, 1, 2), torch.tensor([labels[i] for i in keep]),
                    [paths[i] for i in keep], names, [digests[i] for i in keep],
                    Path(root).resolve().name, base, ignored, bad, shapes)
    for name in folders:
        if names.index(name) not in images.labels:
            raise InputError(f"class {name} has no readable image")
    return images


def load(args: argparse.Namespace) -> Images:
    """The data set that the flags name, --data DIR or the drawn smears, after --remove.
    The digests, and so the fingerprint, are those of the images before --remove."""
    images = _read(args)
    images.pixels = interventions.apply(images.pixels, interventions.chosen(args))
    return images


def _read(args: argparse.Namespace) -> Images:
    if args.data is not None:
        images = read_folder(args.data, args.image_size, args.skip_bad,
                             getattr(args, "classes", None))
        if images.ignored:
            warn(f"--data: passed over {say_passed(images.ignored)}")
        if images.bad:
            warn(f"--skip-bad: {len(images.bad)} unreadable image(s) left out: "
                 + ", ".join(name for name, _ in images.bad))
        return images
    check_memory(sum(synthetic.COUNTS.values()), args.image_size)
    pixels, names, paths = synthetic.draw(args.image_size)
    digests = [hashlib.sha256(p.tobytes()).hexdigest() for p in pixels]
    shapes = Counter({(args.image_size, args.image_size, "RGB"): len(paths)})
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2),
                  torch.tensor([CLASSES.index(name) for name in names]), paths, list(CLASSES),
                  digests, "synthetic", found=shapes)


# ---- split and clients ------------------------------------------------------------------------

def read_groups(path: str, paths: list[str]) -> list[str]:
    """The group of each image, from a CSV of path,group rows that must name every image."""
    try:
        rows = [line.rsplit(",", 1) for line in Path(path).read_text(
            "utf-8", "surrogateescape").splitlines() if line]
        groups = {name.strip().strip('"'): group.strip() for name, group in rows}
    except ValueError:
        raise InputError(f"--groups {path}: not rows of path,group") from None
    missing = [p for p in paths if p not in groups]
    if missing:
        raise InputError(f"--groups {path}: {len(missing)} image(s) not in it, first {missing[0]}")
    return [groups[p] for p in paths]


def make_split(args: argparse.Namespace, images: Images) -> splits.Split:
    """The split that the flags describe; prints test images with an identical twin in training."""
    split = splits.make_split(args.split, images.labels.numpy(), args.split_seed,
                              paths=images.paths, groups=_groups(args, images))
    if args.split == "stratified80":
        warn("WARNING: --split stratified80 selects the model on its own test part (the paper's "
             "Table 1): its test figures are optimistic")
    _check_parts(args, images, [split])
    return split


def make_folds(args: argparse.Namespace, images: Images) -> list[splits.Split]:
    """The --folds splits of k-fold cross-validation, checked and described like `make_split`."""
    folds = splits.make_folds(args.split, images.labels.numpy(), args.folds, args.split_seed,
                              inner_val=args.inner_val, paths=images.paths,
                              groups=_groups(args, images))
    _check_parts(args, images, folds)
    return folds


def _groups(args: argparse.Namespace, images: Images) -> list[str]:
    if args.groups and args.split != "grouped":
        raise InputError("--groups is used by --split grouped only")
    return read_groups(args.groups, images.paths) if args.groups else images.digests


def _check_parts(args: argparse.Namespace, images: Images, several: list[splits.Split]) -> None:
    """Raise InputError where a training part lacks a class; print how many images have a twin."""
    labels, twins, sizes = images.labels.numpy(), Counter(), Counter()
    for split in several:
        absent = set(labels.tolist()) - set(labels[split["train"]].tolist())
        if absent:
            raise InputError(f"class {images.classes[min(absent)]} is too small for the "
                             f"{args.split} split: the training part has none of it")
        for part in ("val", "test"):
            twins[part] += splits.count_twins(images.digests, split[part], split["train"])
            sizes[part] += len(split[part])
    copies = len(images.digests) - len(set(images.digests))
    print(f"identical images: {copies} copies of another; with a twin in training: "
          f"{twins['val']} of {sizes['val']} validation, "
          f"{twins['test']} of {sizes['test']} test images")


def make_clients(args: argparse.Namespace, images: Images, split: splits.Split) -> list[np.ndarray]:
    """The training part dealt to the clients that the flags describe."""
    return splits.partition(args.partition, images.labels.numpy(), split["train"], args.clients,
                            args.split_seed, alpha=args.alpha,
                            classes_per_client=args.classes_per_client)


# ---- batches ----------------------------------------------------------------------------------

def epoch_order(labels: Tensor, sampler: str, expand: int, generator: torch.Generator,
                batch_size: int) -> Tensor:
    """Positions 0..n-1 in the order of one epoch, int64 [n·expand].

    shuffle: every image `expand` times. balanced: drawn with replacement, classes equally likely.
    dual: the first half of each batch from the shuffled order, the second half drawn balanced (our
    reading of the paper's "dual-input generator", section III)."""
    n = len(labels)
    order = torch.randperm(n * expand, generator=generator) % n
    if sampler != "shuffle":
        weights = 1.0 / torch.bincount(labels)[labels]
        drawn = torch.multinomial(weights, n * expand, replacement=True, generator=generator)
        if sampler == "balanced":
            return drawn
        natural = torch.arange(n * expand) % batch_size < batch_size // 2
        return torch.where(natural, order, drawn)
    return order


def batch_slices(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Consecutive batches. A last batch of one image is dropped: BatchNorm cannot use it."""
    for batch in order.split(batch_size):
        if len(batch) > 1 or batch_size == 1 or len(order) == 1:
            yield batch


def gather(images: Images, indices: Tensor, device: torch.device) -> Tensor:
    """Copies of the images as float [n, 3, H, W] in 0..1 on `device`."""
    stored = images.pixels.permute(0, 2, 3, 1)  # contiguous rows: one copy per image
    rows = stored[indices.to(stored.device)].permute(0, 3, 1, 2)
    return rows.to(device, non_blocking=True).float().div_(255)


def normalise(batch: Tensor) -> Tensor:
    """ImageNet mean and standard deviation (section 3.2.2); returns channels_last."""
    mean = torch.tensor(IMAGENET_MEAN, device=batch.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=batch.device).view(1, 3, 1, 1)
    return ((batch - mean) / std).contiguous(memory_format=torch.channels_last)


def train_batch(images: Images, indices: Tensor, ranges: Augmentation | None,
                generator: torch.Generator, device: torch.device) -> Tensor:
    """A gathered, augmented and normalised batch, for training only: validation and test images
    never come through here."""
    batch = gather(images, indices, device)
    if ranges is not None:
        batch = augment(batch, draw_parameters(len(batch), ranges, generator))
    return normalise(batch)


def eval_batch(images: Images, indices: Tensor, device: torch.device) -> Tensor:
    """A gathered and normalised batch. Nothing in it is random."""
    return normalise(gather(images, indices, device))


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
    split = make_split(args, images)
    clients = make_clients(args, images, split)
    parts = {"all": np.arange(len(images.paths)), **split}
    parts |= {f"client {k}": part for k, part in enumerate(clients)}
    width = max(map(len, images.classes)) + 2
    print(f"{'part':<12}{'images':>8}" + "".join(f"{c:>{width}}" for c in images.classes))
    for name, part in parts.items():
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
        rows.append(torch.cat(list(drawn), 2))
    sheet = (torch.cat(rows, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: Image.fromarray(sheet).save(file, "PNG"))
    print(f"contact sheet (first column as read, the rest augmented): {path}")


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    add_client_arguments(parser)
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
