"""What a finished run leaves: predictions, written and read back; history and images."""

from checks import InputError

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax

from data import load
from dataset.images import UNITS, Images
from dataset.splits import Split
from reporting.run_folder import CSV, check_images, part_names, read_run, split_rows, write_csv


@dataclass(frozen=True)
class Predictions:
    """Rows of a `predictions.csv`, in the order of their paths."""
    paths: list[str]
    labels: np.ndarray  # int64 [n]
    logits: np.ndarray  # float64 [n, C], the logarithms of the probabilities written
    classes: list[str]


def write_predictions(folder: Path, images: Images, split: Split, logits: dict) -> None:
    """predictions.csv of the best model. logits: part → float32 [n, C] in the order of the part."""
    names, rows = part_names(split, len(images.paths)), {}
    for part, values in logits.items():
        for i, p in zip(split[part], softmax(values.astype(np.float32), axis=1), strict=True):
            rows.setdefault(i, [images.paths[i], images.classes[images.labels[i]], names[i],
                                images.classes[p.argmax()], *(f"{x:.9g}" for x in p)])
    header = ["path", "label", "split", "prediction", *(f"p_{c}" for c in images.classes)]
    write_csv(folder / "predictions.csv", [header, *rows.values()])


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
        parts = sorted(p.parent.name for p in folder.glob("*/predictions.csv"))
        raise InputError(f"{folder}: has no predictions.csv; " + (
            f"name one of its parts: {', '.join(parts)}" if parts else "is the run complete?")
            ) from None
    except (ValueError, IndexError) as error:
        raise InputError(f"{folder}/predictions.csv: damaged ({error})") from None
    if not rows:
        raise InputError(f"{folder}/predictions.csv: no {part} image in it")
    return Predictions([row[0] for row in rows], labels, np.log(np.maximum(p, 1e-45)), classes)


def read_history(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "history.jsonl").read_text("utf-8").splitlines()]


def read_units(folder: Path, paths: list[str]) -> tuple[str, np.ndarray] | None:
    """("patient", their names, str [n]) of these images where the run knew them, else of its
    groups; None where it knew neither."""
    rows = split_rows(folder) if (folder / "split.csv").exists() else {}
    return next(((unit, np.array([rows[path][unit] for path in paths])) for unit in UNITS
                 if rows and all(rows.get(path, {}).get(unit) is not None for path in paths)), None)


def read_arguments(folder: Path, place: str | None, cache: str | None) -> argparse.Namespace:
    """The arguments of a run, to read its images with again. place: the folder where they are now,
    if they were moved. cache: as --cache. InputError where that folder is not there."""
    arguments = read_run(folder)["arguments"]
    moved = {"cache": cache} | ({"data": place} if place else {})
    if arguments["table"] and (folder / "split.csv").exists():  # it says all that the table said
        moved |= {"table": str(folder / "split.csv"), "columns": None, "skip_unlisted": True}
    args = argparse.Namespace(**arguments | moved)
    if args.data is not None and not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: no such folder (images that were moved: --data DIR)")
    return args


def load_images(folder: Path, place: str | None = None,
                cache: str | None = None) -> tuple[dict, Images]:
    """run.json of a run, and the images that it was made with, read again."""
    images = load(read_arguments(folder, place, cache))
    return check_images(folder, images), images
