"""The run folder, the contract between scripts: create, resume, append, write.

run.json, split.csv, history.jsonl, last.pt, model.pt, predictions.csv, results.json, figures and
report.md (report.py). Every file that is rewritten is written beside and renamed, so that a kill
leaves the old one or the new one, whole.
"""

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from checks import InputError, make_parser, warn
from data import Images, load
from dataset import interventions
from dataset.files import say_passed
from dataset.splits import Split
from models import read_file, save, write_whole
from reporting.provenance import git_commit, launcher, machine, restarts

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

CSV = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # any name on any disk
UNRECORDED = ("resume", "out", "timeout", "argv")  # arguments that say where, not what


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the run folder, shared by the trainers."""
    add = parser.add_argument_group("run folder").add_argument
    add("--out", metavar="DIR", help="default: runs/ and a name of script, model, data and seed")
    add("--resume", metavar="DIR", help="continue a run with the arguments recorded in it")


def parse(description: str, groups: Sequence, defaults: Callable[[argparse.Namespace], dict],
          argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a trainer. With --resume, every flag has the value that the run recorded.
    groups: functions that add flags to the parser. defaults: what some flags (no --data, --like)
    set for others that are not given. Raises InputError for a folder that is no run, and for a
    flag whose value differs from the recorded one."""
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
            if again[name] != value and not (name == "data" and value):  # moved: the images decide
                raise InputError(f"--resume {args.resume}: --{name.replace('_', '-')} is "
                                 f"{value} there, not {again[name]}")
        if args.out is not None:
            raise InputError("--resume continues its own folder; --out has no place beside it")
        return argparse.Namespace(**again)
    parser.set_defaults(**defaults(args))
    args = parser.parse_args(argv)
    if args.out is not None and Path(args.out).exists() and "RANK" not in os.environ:
        raise InputError(f"--out {args.out}: exists already (--resume continues a run)")
    return args


def read_json(path: Path) -> dict:
    """The content of a JSON file of a run folder. InputError where there is no such run."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: not a run folder, it has no {path.name}") from None
    except ValueError:
        raise InputError(f"{path}: damaged, not JSON") from None
    needed = {"run.json": "arguments", "results.json": "fingerprint"}.get(path.name)
    if not isinstance(content, dict) or needed and needed not in content:
        raise InputError(f"{path}: not written by a run of this project")
    return content


def read_run(folder: Path) -> dict:
    """run.json of a run folder, the arguments of older runs under today's names."""
    run = read_json(folder / "run.json")
    return run | {"arguments": modern(run["arguments"])}


def modern(arguments: dict) -> dict:
    """The arguments of a run made before flags were renamed, under today's names and values.
    What has no counterpart today keeps its old name, so that nothing is silently left out."""
    new = dict(arguments)
    new.setdefault("remove", interventions.modern(
        [name for name in interventions.RENAMED if new.pop(name, False)]))
    if new.get("translation") in (0, 0.1):
        kind = "translate" if new.pop("translation") else "paper"
        new["augment"] = "none" if new.pop("no_augment") else kind
    if new.get("site_data") and "site_names" in new:
        names = new.pop("site_names") or [f"site{k}" for k in range(len(new["site_data"]))]
        new["site_data"] = [f"{n}={d}" for n, d in zip(names, new["site_data"], strict=False)]
    for gone, neutral in (("momentum", 0.9), ("local_only", False), ("seeds", None),
                          ("models", None), ("site_names", None), ("share_scores", False)):
        if gone in new and new[gone] == neutral:
            del new[gone]
    return new


def write_text(path: Path, text: str) -> None:
    """Write a text file, the whole of it or nothing."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_csv(path: Path, rows: list[list]) -> None:
    """Write a header and rows as CSV, the whole of it or nothing."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def new_folder(out: str | None, default: str) -> Path:
    """Make the folder that --out names, or the default one with a number if the name is taken."""
    base = Path(out or default)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if out is not None or not folder.exists():  # not there, and yet in the way
                raise InputError(f"{folder}: exists already, or leads through a broken link"
                                 ) from None


@contextmanager
def made(out: str | None, default: str) -> Iterator[Path]:
    """The folder that one call makes and fills; gone again if the work fails or is stopped."""
    folder = new_folder(out, default)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)  # made by this very call
        raise


@contextmanager
def reserved(out: str | None, default: Path, companion: str) -> Iterator[Path]:
    """The name of a file to write: `out`, or the default, numbered if taken. Held by an empty file
    until it is written, so that two processes never take one name; free again if the work fails.
    companion: suffix of a second file that is written beside. Raises InputError before any work."""
    for number in itertools.count(1):
        number = f"-{number}" if number > 1 else ""
        path = Path(out) if out else default.with_name(f"{default.stem}{number}{default.suffix}")
        taken = [p for p in (path, path.with_suffix(companion)) if p.exists()]
        if out and (taken or path.suffix == companion):
            raise InputError(f"--out {out}: " + (f"{taken[0]} exists already" if taken else
                                                 f"must not end in {companion}"))
        try:
            if not taken:
                path.touch(exist_ok=False)
                break
        except FileExistsError:
            continue  # taken by another process a moment ago
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"--out {path}: there is no folder {path.parent}") from None
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_run(folder: Path, args: argparse.Namespace, script: str, images: Images,
              device: torch.device, part_of: str | None = None) -> None:
    """Write run.json: everything that made the run what it is. part_of: the name of the larger
    run that this one is a fold, a client or a hospital of."""
    write_json(folder / "run.json", {
        "script": f"train_{script}.py", "part_of": part_of,
        "argv": args.argv,
        "arguments": {k: v for k, v in vars(args).items() if k not in UNRECORDED} | {
            "data": args.data and os.path.abspath(args.data)},
        "seed": args.seed, "synthetic": args.data is None, "data": images.name,
        "fingerprint": images.fingerprint(), "classes": images.classes,
        "images": len(images.paths), "bad_files": images.bad,
        "ignored_files": images.ignored and say_passed(images.ignored),
        "machine": machine(device), "git": git_commit(), "launcher": launcher()})


def begin(args: argparse.Namespace, script: str, images: Images, device: torch.device,
          writes: bool = True) -> Path | None:
    """The run folder: a new one with its run.json, or the one to resume.
    Refuses to resume with other images (InputError). Warns of another machine or version."""
    if not writes:  # another process of the job does
        return None
    if args.resume is None:
        name = f"runs/{script}-{args.model}-{images.name}-seed{args.seed}"
        with made(args.out, name) as folder:
            write_run(folder, args, script, images, device)
        return folder
    run = check_images(Path(args.resume), images)
    for key, value in machine(device).items():
        if run["machine"].get(key) != value:
            warn(f"note: {key} was {run['machine'].get(key)} and is {value}: results may differ "
                 "from an uninterrupted run")
    return Path(args.resume)


def check_images(folder: Path, images: Images) -> dict:
    """run.json of a run that was made with exactly these images. InputError for other images."""
    run = read_run(folder)
    if run["fingerprint"] != images.fingerprint():
        raise InputError(f"{folder}: the images are not those of the run")
    return run


def load_images(folder: Path, place: str | None = None) -> tuple[dict, Images]:
    """run.json of a run, and the images that it was made with, read again. place: the folder where
    they are now, if they were moved."""
    arguments = read_run(folder)["arguments"]
    moved = {"data": place} if place else {}
    try:
        images = load(argparse.Namespace(**arguments | moved))
    except InputError as error:
        raise InputError(f"{error} (images that were moved: --data DIR)") from None
    return check_images(folder, images), images


def start_or_resume(folder: Path, images: Images, split: Split, clients: list[np.ndarray],
                    start: dict) -> dict:
    """The checkpoint to go on from. A new run begins with its split and its start on disk."""
    if (folder / "last.pt").exists():
        checkpoint = read_file(folder / "last.pt")
        write_history(folder, checkpoint["history"])  # later lines will be written again
        return checkpoint
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
    for flag in ("--out", "--resume", "--timeout"):
        parser.add_argument(flag)
    given, _ = parser.parse_known_args(argv)
    if not restarts() or given.resume:
        return argv
    out = given.out and Path(given.out)
    if out and out.is_dir() and not any(out.iterdir()):
        out.rmdir()  # killed between making it and writing in it
    places = [out] if out else sorted((p.parent for p in Path("runs").glob("*/run.json")),
                                      key=lambda p: p.stat().st_mtime)
    mine = [p for p in places if (p / "run.json").exists()
            and read_json(p / "run.json").get("launcher") == launcher()]
    timeout = ["--timeout", given.timeout] if given.timeout else []
    return ["--resume", str(mine[-1]), *timeout] if mine else argv


def append_history(folder: Path, record: dict) -> None:
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write_history(folder: Path, history: list[dict]) -> None:
    write_text(folder / "history.jsonl", "".join(json.dumps(r) + "\n" for r in history))


def read_history(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "history.jsonl").read_text("utf-8").splitlines()]


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
    write_csv(folder / "split.csv", [["path", "label", "split", "client"], *rows])


def read_split(folder: Path, images: Images) -> tuple[Split, list[np.ndarray]]:
    """The split and the clients of a run, as its split.csv has them. InputError for none."""
    try:
        with open(folder / "split.csv", **CSV) as file:
            rows = {row["path"]: row for row in csv.DictReader(file)}
        parts = [rows[path]["split"].split("+") for path in images.paths]
        owners = np.array([int(rows[path]["client"] or -1) for path in images.paths])
    except FileNotFoundError:
        raise InputError(f"{folder}: not a run of one network, it has no split.csv") from None
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{folder}/split.csv: damaged ({error})") from None
    return ({name: np.flatnonzero([name in part for part in parts])
             for name in ("train", "val", "test")},
            [np.flatnonzero(owners == k) for k in range(owners.max() + 1)])


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
