"""The tables of a run folder: any CSV, and split.csv, written and read back."""

from checks import InputError

import csv
import io
from pathlib import Path

import numpy as np

from dataset.images import UNITS, Images
from dataset.splits import Split, by_name
from models import write_whole

CSV = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # any name on any disk


def write_text(path: Path, text: str) -> None:
    """Write a text file, the whole of it or nothing."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_csv(path: Path, rows: list[list]) -> None:
    """Write a header and rows as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


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


def split_rows(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of split.csv by their path. FileNotFoundError where there is none."""
    with open(folder / "split.csv", **CSV) as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def read_split(folder: Path, images: Images) -> tuple[Split, list[np.ndarray], list[str]]:
    """Split, clients and their names, as split.csv of a run has them. InputError for none."""
    try:
        rows = split_rows(folder)
        parts = [rows[path]["split"].split("+") for path in images.paths]
        owners = np.array([rows[path]["client"] for path in images.paths])
    except FileNotFoundError:
        raise InputError(f"{folder}: not a run of one network, it has no split.csv") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder}/split.csv: damaged ({error})") from None
    split = {name: np.flatnonzero([name in part for part in parts])
             for name in ("train", "val", "test")}
    names = sorted(set(owners[split["train"]].tolist()) - {""}, key=by_name)
    return split, [np.intersect1d(split["train"], np.flatnonzero(owners == name))
                   for name in names], names


def check_split(folder: Path, images: Images, split: Split,
                clients: list[np.ndarray] | None = None) -> tuple[list[np.ndarray], list[str]]:
    """The clients of a run and their names. InputError where split.csv has another split than this,
    or other clients than these, where given (that have images)."""
    there, owned, names = read_split(folder, images)
    given = owned if clients is None else [own for own in clients if len(own)]
    if not all(np.array_equal(there[part], split[part]) for part in split) or (
            [own.tolist() for own in owned] != [own.tolist() for own in given]):
        raise InputError(f"{folder}: the flags and the table here do not give its split or clients")
    return owned, names
