"""Files on disk: which belong to which class, and one file as 8-bit RGB pixels."""

from checks import InputError, warn

import contextlib
import hashlib
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

CLASSES = ("Benign", "Early", "Pre", "Pro")
CLASS_NAMES = {"benign": "Benign", "early": "Early", "pre": "Pre", "pro": "Pro",
               "[malignant] early pre-b": "Early", "[malignant] pre-b": "Pre",
               "[malignant] pro-b": "Pro"}
# Every format that Pillow opens, less those for which it only has a stub without a decoder.
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in ("BUFR", "FITS", "GRIB", "HDF5", "MPEG", "WMF")}
AHEAD = 2**24  # bytes of pixels that are decoded before the first of them must have been used
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
         "dev": "val", "test": "test", "testing": "test"}  # words for the parts of a given split
with contextlib.suppress(KeyError, ValueError):  # not set, or no whole number
    Image.MAX_IMAGE_PIXELS = int(os.environ["MAX_IMAGE_PIXELS"])
SERVICE = {"@eadir", "__macosx", "$recycle.bin", "#recycle", "system volume information",
           "lost+found"}  # folders that file servers and operating systems make


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a service folder: nobody meant it as images."""
    return name.startswith(".") or name.lower() in SERVICE


def composed(name: str) -> str:
    """The name with ä as one sign: macOS writes it as two, and other names would not be equal."""
    return unicodedata.normalize("NFC", name)


@dataclass
class Found:
    """Image files, and what is known of each before it is decoded."""
    base: Path  # the folder that their paths are relative to
    files: list[Path]
    labels: list[str]  # class names; "" where only a table knows them
    known: dict[str, list[str]]  # patient, group, split, client: a value an image, "" for unknown
    ignored: Counter = field(default_factory=Counter)  # files that were passed over, by suffix
    places: tuple[Path, ...] = (Path(),)  # --data, and the folder of the class folders

    def by_class(self) -> "Found":
        """The same, class by class, within a class in the same order."""
        order = sorted(range(len(self.files)), key=self.labels.__getitem__)
        return replace(self, files=[self.files[i] for i in order],
                       labels=[self.labels[i] for i in order],
                       known={c: [v[i] for i in order] for c, v in self.known.items()})


def find_images(root: Path, classes: list[str] | None = None, labelled: bool = False) -> Found:
    """Every image under `root`, class by class; in a tree with a folder for each part of a split
    (train/, val/, test/, each with the same class folders) also its part. labelled: a table knows
    the labels, so that any tree will do. Raises InputError like `find_class_folders`."""
    try:
        base, folders = descend(root, classes)
        parts = [p for p in folders if p.name.lower() in PARTS]
        trees = [find_class_folders(folder, classes) for folder in parts or [base]]
    except InputError:
        if not labelled or not root.is_dir():
            raise
        base, parts = root, []
    if labelled:
        files, ignored = find_files(root, set())
        known = {"split": [next((PARTS[p.name.lower()] for p in parts if f.is_relative_to(p)), "")
                           for f in files]} if parts else {}
        return Found(root, files, [""] * len(files), known, ignored, (root, base))
    if len({PARTS[p.name.lower()] for p in parts}) < len(parts) or any(
            set(tree) != set(trees[0]) for tree in trees) and classes is None:
        raise InputError(f"--data {base}: {', '.join(p.name for p in parts)}: parts of a given "
                         "split, but not one of each kind with the same class folders")
    entered = {base, *folders, *(p for tree in trees for p in tree.values())}
    visited = set(map(os.path.realpath, entered))
    if len(visited) < len(entered):
        raise InputError(f"--data {base}: one folder under two names, by a link")
    out = Found(base, [], [], {"split": []} if parts else {}, places=(root, base))
    above = [p for p in base.parents if p.is_relative_to(root)]  # wrapping folders
    out.ignored = Counter(p.suffix or p.name for folder in (base, *parts, *above)
                          for p in folder.iterdir() if (p.is_file() or folder not in above)
                          and not any(inner.is_relative_to(p) for inner in entered))
    for part, tree in zip(parts or [None], trees, strict=True):
        for name, folder in tree.items():
            files, passed = find_files(folder, visited)
            if not files:
                raise InputError(f"--data: class folder {folder} has no image in it")
            out.files += files
            out.labels += [name] * len(files)
            out.ignored += passed
            if part:
                out.known["split"] += [PARTS[part.name.lower()]] * len(files)
    return out


def descend(root: Path, classes: list[str] | None = None) -> tuple[Path, list[Path]]:
    """The folder that holds the class folders, or the parts of a given split, and these folders.
    Steps into a folder `Original` and single wrapping folders. InputError for none, or several."""
    if not root.is_dir():
        raise InputError(f"--data {root}: no such folder")
    runs = Path("runs").resolve()  # ours: what it holds are figures of runs
    while True:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name)
                         and p.resolve() != runs and not (p / "run.json").exists())
        known = {p.name.lower(): p for p in folders}
        if parts := [p.name for p in folders if p.name.lower() in PARTS]:
            if len(parts) < len(folders):
                raise InputError(f"--data {root}: {', '.join(parts)}: by their names parts of a "
                                 "given split, but not the other folders; move those, or rename")
            return root, folders
        inner = "original" in known and any(p.is_dir() for p in known["original"].iterdir())
        if inner and set(known) <= {"original", "segmented"}:
            root = known["original"]
        elif inner:
            raise InputError(f"--data {root}: the classes may be the folders here or those in "
                             f"{known['original'].name}; pass the folder that holds them alone")
        elif (len(folders) == 1 and any(p.is_dir() for p in folders[0].iterdir())
              and CLASS_NAMES.get(folders[0].name.lower(), folders[0].name)
              not in (classes or ())):
            root = folders[0]
        elif folders:
            return root, folders
        else:
            raise InputError(f"--data {root}: no class folder in it")


def find_class_folders(root: Path, classes: list[str] | None = None) -> dict[str, Path]:
    """Class name → folder, sorted. classes: the class list of a federation; a hospital may lack
    some of them, and has no other. Raises InputError for no class folder, one class only, an
    unknown class, or the parts of a given split where classes should be."""
    root, folders = descend(root, classes)
    if folders[0].name.lower() in PARTS:
        raise InputError(f"--data {root}: parts of a given split where classes should be")
    names = class_names([p.name for p in folders], classes, f"--data {root}")
    if len(set(names.values())) < len(names):
        raise InputError(f"--data {root}: class folders of the same name in two Unicode forms")
    inside = [sorted(q.name for q in p.iterdir() if q.is_dir()) for p in folders]
    if len(inside) > 1 < len(inside[0]) and all(inner == inside[0] for inner in inside):
        warn(f"note: --data {root}: {', '.join(inside[0])} in each class are not taken for classes")
    return dict(sorted((names[p.name], p) for p in folders))


def class_names(given: list[str], classes: list[str] | None, where: str) -> dict[str, str]:
    """The class that each of these names means: those of the public layouts have names of their
    own. Raises InputError for one class only, or for one that `classes` does not have."""
    names = {name: CLASS_NAMES.get(name.lower(), composed(name)) for name in given}
    if not set(names.values()) <= set(classes or CLASSES) or len(set(names.values())) < len(given):
        names = {name: composed(name) for name in given}
    unknown = sorted(set(names.values()) - set(classes or names.values()))
    if unknown:
        raise InputError(f"{where}: unknown class {unknown[0]}; the federation has "
                         f"{', '.join(classes)}")
    if len({name.casefold() for name in given}) < len(given):
        warn(f"note: {where}: classes that differ by case alone: {', '.join(given)}")
    if len(set(names.values())) < 2 and classes is None:
        raise InputError(f"{where}: one class only ({', '.join(given)}), nothing to tell apart")
    return names


def find_files(folder: Path, visited: set[str]) -> tuple[list[Path], Counter]:
    """Image files under `folder` in ImageFolder's order, and how many files were passed over, by
    suffix. visited: real paths of folders that are not entered, by a link say; grows."""
    def stop(error: OSError) -> None:
        raise error
    walked, files, passed = [], [], Counter()
    for top, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if top != str(folder) and os.path.realpath(top) in visited:
            passed["folder that was read already"] += 1
            folders.clear()
            continue
        visited.add(os.path.realpath(top))
        passed["hidden or service folder"] += sum(map(is_hidden, folders))
        folders[:] = [name for name in folders if not is_hidden(name)]
        walked.append((top, names))
    for top, names in sorted(walked):
        for name in sorted(names):
            if is_hidden(name) or Path(name).suffix.lower() not in SUFFIXES:
                passed["hidden" if is_hidden(name) else Path(name).suffix or "no suffix"] += 1
            else:
                files.append(Path(top) / name)
    return files, +passed


def say_passed(passed: Counter) -> str:
    """What was passed over, in words: `3 .txt, 1 hidden`."""
    return ", ".join(f"{count} {kind}" for kind, count in passed.most_common()) or "nothing"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: turned upright by its EXIF block, 16 bits scaled to 8, and
    transparent parts laid over white."""
    image.load()  # here: below, what a broken file raises would be taken for a broken EXIF block
    with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse whole pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64).clip(0)
        if grey.max() > 65535:
            raise ValueError("pixels of more than 16 bits have no defined white")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def decode(path: Path, size: int) -> tuple[np.ndarray, str, tuple]:
    """One file → uint8 [size, size, 3], pixel digest, (width, height, mode)."""
    with Image.open(path) as image:
        mode, deep = image.mode, image.mode.startswith("I") or ";16" in str(image.tile)
        white_is_zero = deep and getattr(image, "tag_v2", {}).get(262) == 0  # of a TIFF
        rgb = to_rgb(image)
    if white_is_zero:  # Pillow inverts 8 bits itself
        rgb = ImageOps.invert(rgb)
    if deep and 0 < np.asarray(rgb).max() < 32:  # 10 or 12 bits of a camera, stored in 16
        raise ValueError("16-bit pixels, nearly black: scale them to 16 bits, or save them with 8")
    digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    return np.asarray(rgb.resize((size, size), Image.BILINEAR)), digest, (*rgb.size, mode)


def decode_all(files: list[Path], size: int) -> Iterator[tuple | str]:
    """What `decode` makes of each file, in their order, in parallel; of a bad one the reason."""
    def work(path: Path) -> tuple | str:
        try:
            return decode(path, size)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            return (f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; the environment variable "
                    "MAX_IMAGE_PIXELS, a whole number, raises this limit")
        except Exception as error:  # noqa: BLE001 - decoders raise all sorts on broken files
            return " ".join(str(error).replace(str(path), "it").split())
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        ahead = max(os.cpu_count() or 1, AHEAD // (3 * size * size))
        for start in range(0, len(files), ahead):
            yield from pool.map(work, files[start:start + ahead])
