"""Images on disk → one uint8 tensor, decoded once; batches on the training device.

As a script it describes a data set without training:

    python data.py --data DIR          # counts, splits, clients, duplicates, a contact sheet
    python data.py                     # the same of the embedded synthetic smears, in seconds

Reads any tree with one folder per class. The two public layouts of the ALL set are recognised, and
their class names mapped to Benign, Early, Pre, Pro.
"""

from checks import InputError, guard, integer, make_parser, warn

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset import interventions, parts, synthetic, table
from dataset.augment import Augmentation, augment, draw_parameters
from dataset.files import Found, decode_all, find_images, say_passed
from dataset.images import Images

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # section 3.2.2
SAMPLERS = ("shuffle", "balanced", "dual")
EVAL_BATCH = 64  # memory only: float32 evaluation does not depend on it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of images and split, shared by every script that reads images."""
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="one folder per class; without it: synthetic smears")
    add("--image-size", type=integer(8), default=224, help="side in pixels (default 224)")
    add("--skip-bad", action="store_true", help="go on without unreadable images, and record which")
    table.add_arguments(add)
    interventions.add_arguments(parser)
    parts.add_arguments(parser)


# ---- reading ----------------------------------------------------------------------------------

def read_folder(root: str, size: int, skip_bad: bool = False, classes: list[str] | None = None,
                listed: table.Table | None = None, skip_unlisted: bool = False) -> Images:
    """Decode every image under `root` once, in parallel, and resize it to size × size.
    classes: the class list of a federation, of which a hospital may lack some; by default the
    classes that are found. listed: a table, which decides what belongs to the set.
    Raises InputError for a missing, empty or one-class folder, and for unreadable images, naming
    all of them; with `skip_bad` they are left out and listed in `bad`."""
    there = find_images(Path(root), classes, listed is not None and "label" in listed.columns)
    if listed is not None:
        there = table.apply(listed, there, skip_unlisted, classes)
    there = there.by_class()
    images = _collect(there, decode_all(there.files, size), size, classes)
    images.name, images.root, images.ignored = Path(root).resolve().name, there.base, there.ignored
    if images.bad and not skip_bad:
        names = "; ".join(f"{name} ({reason})" for name, reason in images.bad)
        raise InputError(f"{len(images.bad)} unreadable image(s), --skip-bad goes on without: "
                         f"{names}")
    for name in sorted(set(there.labels)):
        if images.classes.index(name) not in images.labels:
            raise InputError(f"class {name} has no readable image")
    return images


def _collect(there: Found, decoded: Iterator, size: int, classes: list[str] | None) -> Images:
    """One data set of what was decoded, in the order of `there.files`; the rest is `bad`."""
    n, names = len(there.files), list(classes or sorted(set(there.labels)))
    pixels = np.empty((n, size, size, 3), np.uint8)
    digests, shapes, bad, keep = [""] * n, Counter(), [], []
    paths = [path.relative_to(there.base).as_posix() for path in there.files]
    for i, result in enumerate(tqdm(decoded, "decoding", n, disable=None, unit="image",
                                    leave=False)):
        if isinstance(result, str):
            bad.append((paths[i], result))
        else:
            pixels[i], digests[i], shape = result
            shapes[shape] += 1
            keep.append(i)
    pixels = torch.from_numpy(pixels[keep] if bad else pixels)
    labels = torch.tensor([names.index(there.labels[i]) for i in keep])
    return Images(pixels.permute(0, 3, 1, 2), labels, [paths[i] for i in keep], names,
                  [digests[i] for i in keep], "", bad=bad, found=shapes,
                  known={c: np.array([v[i] for i in keep]) for c, v in there.known.items()})


def load(args: argparse.Namespace) -> Images:
    """The data set that the flags name, --data DIR or the drawn smears, after --remove.
    The digests, and so the fingerprint, are those of the images before --remove."""
    images = _read(args)
    images.pixels = interventions.apply(images.pixels, interventions.chosen(args))
    return images


def _read(args: argparse.Namespace) -> Images:
    listed = table.chosen(args)
    if args.data is not None:
        images = read_folder(args.data, args.image_size, args.skip_bad,
                             getattr(args, "classes", None), listed, args.skip_unlisted)
        if images.ignored:
            warn(f"--data: passed over {say_passed(images.ignored)}")
        if images.bad:
            warn(f"--skip-bad: {len(images.bad)} unreadable image(s) left out: "
                 + ", ".join(name for name, _ in images.bad))
        return images
    drawn, labels, paths = synthetic.draw(args.image_size)
    there = Found(Path(), [Path(path) for path in paths], labels, {})
    if listed is not None:
        there = table.apply(listed, there, args.skip_unlisted, None)
    there, pixels = there.by_class(), dict(zip(paths, drawn, strict=True))
    shape = args.image_size, args.image_size, "RGB"
    decoded = ((pixels[str(f)], hashlib.sha256(pixels[str(f)]).hexdigest(), shape)
               for f in there.files)
    images = _collect(there, decoded, args.image_size, None)
    images.name = "synthetic"
    return images


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
    parts.settle(args, images)
    split = parts.make_split(args, images)
    clients = parts.make_clients(args, images, split)
    rows = {"all": np.arange(len(images.paths)), **split}
    rows |= dict(zip(images.titles(clients), clients, strict=True))
    width = max(map(len, images.classes)) + 2
    print(f"{'part':<12}{'images':>8}" + "".join(f"{c:>{width}}" for c in images.classes))
    for name, part in rows.items():
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
    Image.fromarray(sheet).save(path)
    print(f"contact sheet (first column as read, the rest augmented): {path}")


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parts.add_client_arguments(parser)
    parser.add_argument("--sheet", metavar="PNG", help="default runs/data-NAME.png")
    args = parser.parse_args()
    args.skip_bad = True  # a description lists the unreadable ones and goes on
    images = load(args)
    describe(args, images)
    contact_sheet(images, Path(args.sheet or f"runs/data-{images.name}.png"))


if __name__ == "__main__":
    guard(main)
