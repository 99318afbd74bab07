"""The tables of a run folder, split.csv and predictions.csv: written whole, read back the same."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax

from checks import InputError
from dataset.images import UNITS, Images
from dataset.splits import Split, by_name
from models import write_whole

CSV = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # any name on any disk


def write_csv(path: Path, rows: list[list]) -> None:
    """Write a header and rows as CSV, the whole of it or nothing."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    text = buffer.getvalue().encode("utf-8", "surrogateescape")
    write_whole(path, lambda file: file.write(text))


def part_names(split: Split, n: int) -> list[str]:
    """Part of each image: train, val, test, val+test (stratified80) or dropped (blocked)."""
    names = ["dropped"] * n
    for part, indices in split.items():
        for i in indices:
            names[i] = part if names[i] == "dropped" else f"{names[i]}+{part}"
    return names


def write_split(folder: Path, images: Images, split: Split, clients: list[np.ndarray]) -> None:
    """split.csv, a table for --table: path, label, split, client (of training images, and of others
    that a table gives to one), and patient and group where they are known."""
    n = len(images.paths)
    owner = {int(i): name for name, own in zip(images.client_names(clients), clients, strict=True)
             for i in own}
    given = images.known.get("client", [""] * n)
    columns = {"path": images.paths, "label": [images.classes[y] for y in images.labels.tolist()],
               "split": part_names(split, n), "client": [owner.get(i, given[i]) for i in range(n)],
               **{unit: images.known[unit] for unit in UNITS if unit in images.known}}
    write_csv(folder / "split.csv", [list(columns), *zip(*columns.values(), strict=True)])


def read_split(folder: Path, images: Images) -> tuple[Split, list[np.ndarray], list[str]]:
    """The split and the clients of a run with their names, as its split.csv has them. InputError
    for none."""
    try:
        with open(folder / "split.csv", **CSV) as file:
            rows = {row["path"]: row for row in csv.DictReader(file)}
    except FileNotFoundError:
        raise InputError(f"{folder}: not a run of one network, it has no split.csv") from None
    parts = [rows[path]["split"].split("+") for path in images.paths]
    owners = np.array([rows[path]["client"] for path in images.paths])
    split = {name: np.flatnonzero([name in part for part in parts])
             for name in ("train", "val", "test")}
    names = sorted(set(owners[split["train"]].tolist()) - {""}, key=by_name)
    return split, [np.intersect1d(split["train"], np.flatnonzero(owners == name))
                   for name in names], names


def read_units(folder: Path, paths: list[str]) -> tuple[str, np.ndarray] | None:
    """("patient", their names, str [n]) of these images where the run knew them, else of its
    groups; None where it knew neither."""
    try:
        with open(folder / "split.csv", **CSV) as file:
            rows = {row["path"]: row for row in csv.DictReader(file)}
    except FileNotFoundError:
        return None
    return next(((unit, np.array([rows[path][unit] for path in paths])) for unit in UNITS
                 if rows and all(rows.get(path, {}).get(unit) is not None for path in paths)), None)


def write_predictions(folder: Path, images: Images, split: Split, logits: dict) -> None:
    """predictions.csv of the best model. logits: part → float32 [n, C] in the order of the part."""
    names = part_names(split, len(images.paths))
    rows, done = [], set()
    for part, values in logits.items():
        for i, p in zip(split[part], softmax(values.astype(np.float32), axis=1), strict=True):
            if i not in done:
                done.add(i)
                rows.append([images.paths[i], images.classes[images.labels[i]], names[i],
                             images.classes[p.argmax()], *(f"{x:.9g}" for x in p)])
    header = ["path", "label", "split", "prediction", *(f"p_{c}" for c in images.classes)]
    write_csv(folder / "predictions.csv", [header, *rows])


@dataclass(frozen=True)
class Predictions:
    """Rows of a `predictions.csv`, in the order of their paths."""
    paths: list[str]
    labels: np.ndarray  # int64 [n]
    logits: np.ndarray  # float64 [n, C], the logarithms of the probabilities written
    classes: list[str]


def read_predictions(folder: Path, part: str = "test") -> Predictions:
    """Test images (all out-of-fold ones of a k-fold run), or those of `val`, as
    `write_predictions` wrote them. Raises InputError where there are none."""
    try:
        with open(folder / "predictions.csv", **CSV) as file:
            header, *rows = csv.reader(file)
        classes = [name.removeprefix("p_") for name in header[4:]]
        rows = sorted(row for row in rows if part in row[2].split("+")
                      or (part == "test" and row[2].startswith("fold")))
        p = np.array([row[4:] for row in rows], dtype=np.float64).reshape(len(rows), len(classes))
        labels = np.array([classes.index(row[1]) for row in rows], dtype=np.int64)
    except FileNotFoundError:
        raise InputError(f"{folder}: has no predictions.csv; is the run complete?") from None
    except (ValueError, IndexError) as error:
        raise InputError(f"{folder}/predictions.csv: damaged ({error})") from None
    if not rows:
        raise InputError(f"{folder}/predictions.csv: no {part} image in it")
    return Predictions([row[0] for row in rows], labels, np.log(np.maximum(p, 1e-45)), classes)
