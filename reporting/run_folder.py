"""The run folder, the contract between scripts: create, resume, append, write.

run.json, split.csv, history.jsonl, last.pt, model.pt, predictions.csv, results.json, figures and
report.md (report.py). Every file that is rewritten is written beside and renamed, so that a kill
leaves the old one or the new one, whole.
"""

from checks import InputError, make_parser, warn

import argparse
import csv
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from data import Images
from dataset.files import say_passed
from dataset.images import UNITS
from dataset.splits import Split, by_name
from models import read_file, save, write_whole
from reporting.provenance import git_commit, launcher, machine, restarts

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

UNRECORDED = ("resume", "out", "timeout", "argv", "cache")  # arguments that say where, not what
PATHS = ("data", "table", "weights", "like")  # arguments that run.json holds as whole paths
CSV = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # any name on any disk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the run folder, shared by the trainers."""
    add = parser.add_argument_group("run folder").add_argument
    add("--out", metavar="DIR", help="default: runs/ and a name of script, model, data and seed")
    add("--resume", metavar="DIR", help="continue a run with the arguments recorded in it")


def parse(description: str, groups: Sequence, defaults: Callable[[argparse.Namespace], dict],
          argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a trainer. With --resume, every flag has the value that the run recorded.
    groups: functions that add flags to the parser. defaults: what some flags (no --data, --like)
    set for others that are not given. InputError for a folder of no run, and flags that differ."""
    parser = make_parser(description)
    for add_group in (*groups, add_arguments):
        add_group(parser)
    parser.set_defaults(argv=sys.argv[1:] if argv is None else list(argv))
    args = parser.parse_args(argv)
    if args.resume is not None:
        run = read_run(Path(args.resume))
        recorded = run["arguments"]
        if ("rounds" in recorded) != ("rounds" in args):  # federated or not
            raise InputError(f"--resume {args.resume}: a run of {run['script']}")
        if unknown := sorted(set(recorded) - set(vars(args))):
            raise InputError(f"--resume {args.resume}: made with {', '.join(unknown)}, which this "
                             "version no longer has")
        if run.get("part_of"):
            raise InputError(f"--resume {args.resume}: part of a larger run, resume "
                             f"{Path(args.resume).parent}")
        parser.set_defaults(**recorded)
        again = vars(parser.parse_args(argv))
        for name, value in recorded.items():
            # of what was moved, the images and the split decide
            if again[name] != value and (name not in PATHS or not value or (
                    name == "weights" and os.path.abspath(again[name]) != value)):
                raise InputError(f"--resume {args.resume}: --{name.replace('_', '-')} is "
                                 f"{value} there, not {again[name]}")
        if args.out is not None:
            raise InputError("--resume continues its own folder; --out has no place beside it")
        return argparse.Namespace(**again)
    parser.set_defaults(**defaults(args))
    args = parser.parse_args(argv)
    if args.out is not None and Path(args.out).exists() and os.environ.get("RANK", "0") == "0":
        raise InputError(f"--out {args.out}: exists already (--resume continues a run)")
    return args


def read_json(path: Path) -> dict:
    """The content of a JSON file of a run folder. InputError where there is no such run."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: not a run folder, or not complete: it has no {path.name}"
                         ) from None
    except ValueError:
        raise InputError(f"{path}: damaged, not JSON") from None
    needed = {"run.json": "arguments", "results.json": "fingerprint"}.get(path.name)
    if not isinstance(content, dict) or needed and needed not in content:
        raise InputError(f"{path}: not written by a run of this project")
    return content


def read_run(folder: Path) -> dict:
    """run.json of a run folder. InputError for one with the flags of an older version."""
    run = read_json(folder / "run.json")
    if not {"remove", "table"} <= run["arguments"].keys():
        raise InputError(f"{folder}: made by a version whose flags this one no longer reads")
    return run


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextmanager
def made(out: str | None, default: str) -> Iterator[Path]:
    """Make the folder --out, or the default, numbered; gone again if its work fails or stops."""
    base = Path(out or default)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if out is not None or not folder.exists():  # not there, and yet in the way
                raise InputError(f"{folder}: exists already, or leads through a broken link"
                                 ) from None
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)  # made by this very call
        raise


def write_run(folder: Path, args: argparse.Namespace, script: str, images: Images,
              device: torch.device, part_of: str | None = None) -> None:
    """Write run.json. part_of: the name of the run that this is a fold, client or hospital of."""
    write_json(folder / "run.json", {
        "script": f"train_{script}.py", "part_of": part_of, "argv": args.argv,
        "arguments": {k: v for k, v in vars(args).items() if k not in UNRECORDED} | {
            name: os.path.abspath(path) for name, path in vars(args).items()
            if name in PATHS and path not in (None, "none", "imagenet")},
        "seed": args.seed, "synthetic": args.data is None, "data": images.name,
        "fingerprint": images.fingerprint(), "classes": images.classes,
        "images": len(images.paths), "bad_files": images.bad,
        "ignored_files": images.ignored and say_passed(images.ignored),
        "machine": machine(device), "git": git_commit(), "launcher": launcher()})


def begin(args: argparse.Namespace, script: str, images: Images, device: torch.device) -> Path:
    """The run folder: a new one with its run.json, or the one to resume.
    Refuses to resume with other images (InputError). Warns of another machine or version."""
    if args.resume is None:
        name = f"runs/{script}-{args.model}-{images.name}-seed{args.seed}"
        with made(args.out, name) as folder:
            write_run(folder, args, script, images, device)
        return folder
    run = check_images(Path(args.resume), images)
    before = run["machine"] | {"commit": run["git"]}
    for key, value in (machine(device) | {"commit": git_commit() or run["git"]}).items():
        if before.get(key) != value:
            warn(f"note: {key} was {before.get(key)} and is {value}: results may differ "
                 "from an uninterrupted run")
    return Path(args.resume)


def check_images(folder: Path, images: Images) -> dict:
    """run.json of a run that was made with exactly these images. InputError for other images."""
    run = read_run(folder)
    if run["fingerprint"] != images.fingerprint():
        raise InputError(f"{folder}: the images are not those of the run")
    return run


def start_or_resume(folder: Path, images: Images, split: Split, clients: list[np.ndarray],
                    start: dict) -> dict:
    """The checkpoint to go on from. A new run begins with its split and its start on disk."""
    if (folder / "last.pt").exists():
        check_split(folder, images, split, clients or None)
        checkpoint = read_file(folder / "last.pt")
        write_history(folder, checkpoint["history"])  # later lines will be written again
        return checkpoint
    if (folder / "results.json").exists():  # starting anew would write over what it found
        raise InputError(f"{folder}: finished, and its last.pt is gone: there is nothing to go on "
                         "from")
    write_split(folder, images, split, clients)
    write_history(folder, [])
    save(start, folder / "last.pt")
    return start


@contextmanager
def resumable(folder: Path | None) -> Iterator[None]:
    """Ctrl-C, a full disk and lost weights end a run with one line that says how to go on.
    While it lasts the folder is locked: InputError for a second process that wants to write there.
    The lock is the operating system's own, so that a kill releases it."""
    hint = folder and f"go on with: python {read_run(folder)['script']} --resume {folder}"
    with ExitStack() as stack:
        if folder is not None and fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{folder}: another process is writing there") from None
        try:
            yield
        except KeyboardInterrupt:
            if folder is not None:
                warn(f"\nstopped; {hint}")
            raise SystemExit(130) from None
        except OSError as error:  # a full disk, say
            raise InputError(f"{error}" + (f"; {hint}" if folder else "")) from None
        except FloatingPointError as error:
            if folder is not None:
                warn(f"{error}; the last good state is kept in {folder}")
            raise SystemExit(1) from None


def continued(argv: list[str]) -> list[str]:
    """The command line of rank 0: after a restart it resumes the folder that its launcher began."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--out", "--resume"):
        parser.add_argument(flag)
    given, others = parser.parse_known_args(argv)
    if not restarts() or given.resume:
        return argv
    out = given.out and Path(given.out)
    if out and out.is_dir() and not any(out.iterdir()):
        out.rmdir()  # killed between making it and writing in it
    places = [out] if out else sorted((p.parent for p in Path("runs").glob("*/run.json")),
                                      key=lambda p: p.stat().st_mtime)
    mine = [p for p in places if (p / "run.json").exists()
            and read_json(p / "run.json").get("launcher") == launcher()]
    return [*others, "--resume", str(mine[-1])] if mine else argv


def unit_of(record: dict) -> str:
    """What a line of history, a checkpoint or a model is counted in."""
    return "round" if "round" in record else "epoch"


def append_history(folder: Path, record: dict) -> None:
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write_history(folder: Path, history: list[dict]) -> None:
    write_text(folder / "history.jsonl", "".join(json.dumps(r) + "\n" for r in history))


# ---- its tables -------------------------------------------------------------------------------

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
