"""The run folder, the contract between scripts: create, resume, append, write.

run.json, split.csv, history.jsonl, last.pt, model.pt, predictions.csv, results.json, figures and
report.md (report.py). Every file that is rewritten is written beside and renamed, so that a kill
leaves the old one or the new one, whole.
"""

import argparse
import csv
import io
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from checks import InputError, make_parser, warn
from data import Images
from models import read_file, write_whole
from splits import Split

UNRECORDED = ("resume", "out")  # arguments that say where, not what


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the run folder, shared by the trainers."""
    add = parser.add_argument_group("run folder").add_argument
    add("--out", metavar="DIR", help="default: runs/ and a name of script, model, data and seed")
    add("--resume", metavar="DIR", help="continue a run with the arguments recorded in it")


def parse(description: str, groups: Sequence, demonstration: dict,
          argv: list[str] | None) -> argparse.Namespace:
    """Parse flags; without --data the demonstration's defaults hold, with --resume the run's own.

    groups: functions that add arguments. Raises InputError for a folder that is no run, and for
    flags that differ from those recorded there.
    """
    parser = make_parser(description)
    for add_group in (*groups, add_arguments):
        add_group(parser)
    args = parser.parse_args(argv)
    if args.resume is not None:
        recorded = read_json(Path(args.resume) / "run.json")["arguments"]
        parser.set_defaults(**recorded)
        again = vars(parser.parse_args(argv))
        for name, value in recorded.items():
            if again[name] != value:
                raise InputError(f"--resume {args.resume}: --{name.replace('_', '-')} is "
                                 f"{value} there, not {again[name]}")
        if args.out is not None:
            raise InputError("--resume continues its own folder; --out has no place beside it")
        return argparse.Namespace(**again)
    if args.data is None:
        parser.set_defaults(**demonstration)
        args = parser.parse_args(argv)
    if args.out is not None and Path(args.out).exists():
        raise InputError(f"--out {args.out}: exists already (--resume continues a run)")
    return args


def read_json(path: Path) -> dict:
    """A JSON file of a run folder; InputError where there is no such run."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: not a run folder, it has no {path.name}") from None
    except ValueError:
        raise InputError(f"{path}: damaged, not JSON") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def create(args: argparse.Namespace, script: str, images: Images, device: torch.device,
           argv: list[str] | None) -> Path:
    """Make the run folder and write `run.json`."""
    base = Path(args.out or f"runs/{script}-{args.model}-{images.name}-seed{args.seed}")
    folder, number = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if args.out is not None:
                raise InputError(f"--out {args.out}: exists already") from None
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    write_json(folder / "run.json", {
        "script": f"train_{script}.py", "argv": sys.argv[1:] if argv is None else argv,
        "arguments": {k: v for k, v in vars(args).items() if k not in UNRECORDED},
        "seed": args.seed, "synthetic": args.data is None, "data": images.name,
        "fingerprint": images.fingerprint(), "classes": images.classes,
        "images": len(images.paths), "ignored_files": images.ignored, "bad_files": images.bad,
        "machine": machine(device), "git": git_commit()})
    return folder


def machine(device: torch.device) -> dict:
    """Versions and hardware that a figure depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "pillow")
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(), **{p: version(p) for p in packages}}


def git_commit() -> str | None:
    """Commit of this code, "+changes" appended where the checkout differs; None outside git."""
    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *command], check=True,
                              capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def resume(folder: Path, images: Images, device: torch.device) -> dict | None:
    """The last checkpoint of a run, None if it was killed before its first.

    Refuses other data (InputError), warns of another machine or version.
    """
    run = read_json(folder / "run.json")
    if run["fingerprint"] != images.fingerprint():
        raise InputError(f"--resume {folder}: the images are not those of the run")
    for key, value in machine(device).items():
        if run["machine"].get(key) != value:
            warn(f"note: {key} was {run['machine'].get(key)} and is {value}: results may differ "
                 "from an uninterrupted run")
    if not (folder / "last.pt").exists():
        return None
    checkpoint = read_file(folder / "last.pt")
    write_history(folder, checkpoint["history"])  # lines after the checkpoint will come again
    return checkpoint


def append_history(folder: Path, record: dict) -> None:
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write_history(folder: Path, history: list[dict]) -> None:
    write_text(folder / "history.jsonl", "".join(json.dumps(r) + "\n" for r in history))


def _csv(rows: list[list]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def part_names(split: Split, n: int) -> list[str]:
    """Part of each image: train, val, test, val+test (stratified80) or dropped (blocked)."""
    names = ["dropped"] * n
    for part, indices in split.items():
        for i in indices:
            names[i] = part if names[i] == "dropped" else f"{names[i]}+{part}"
    return names


def write_split(folder: Path, images: Images, split: Split, clients: list[np.ndarray]) -> None:
    """split.csv: path, label, split, client (training images only)."""
    owner = {int(i): k for k, indices in enumerate(clients) for i in indices}
    rows = [[path, images.classes[label], part, owner.get(i, "")] for i, (path, label, part) in
            enumerate(zip(images.paths, images.labels.tolist(),
                          part_names(split, len(images.paths)), strict=True))]
    write_text(folder / "split.csv", _csv([["path", "label", "split", "client"], *rows]))


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
    write_text(folder / "predictions.csv", _csv([header, *rows]))
