"""A trained run on new images: a CSV; where folders name the classes, the full metrics.

    python predict.py runs/NAME images/ more.jpg     # fast: BatchNorm folded, bf16 where native
    python predict.py runs/NAME DIR --exact          # the figures of training's own evaluation
    python predict.py runs/NAME DIR --map labels.json     # {"folder name": "class", ...}
    python predict.py runs/NAME DIR --table labels.csv    # path,label

Exit code 1 where an image could not be read; the others are done.
"""

from checks import InputError, guard, make_parser, warn

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from tqdm import tqdm

import data
import models
from dataset import interventions, table
from dataset.files import CLASS_NAMES, composed, decode_all, find_files, say_passed
from reporting import finished, inference, metrics, run_folder, terminal

MALIGNANT = ["Benign", "Malignant"]  # what --map may tell apart where subtypes are not known


def find(paths: list[str]) -> list[tuple[Path, Path | None]]:
    """Every image with the given folder that it lies in (None for a file), in the order given.
    Raises InputError for a path that is not there, and where there is no image at all."""
    found, passed = [], Counter()
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files, others = find_files(path, set())
            found += [(file, path) for file in files]
            passed += others
        elif path.exists():
            found.append((path, None))
        else:
            raise InputError(f"{path}: no such file or folder")
    if not found:
        raise InputError(f"no image in {' '.join(paths)}; passed over {say_passed(passed)}")
    if passed:
        warn(f"note: passed over {say_passed(passed)}")
    return found


def read_map(path: str | None, classes: list[str]) -> dict[str, str]:
    """Folder name, in lower case → class: the run's own, the public layouts' names, or --map."""
    if path is None:
        public = {k: v for k, v in CLASS_NAMES.items() if v in classes}
        own, lower = {composed(c): c for c in classes}, {composed(c).lower(): c for c in classes}
        # names that differ by case alone must be met exactly
        return public | (lower if len(lower) == len(own) else {}) | own
    try:
        text = composed(Path(path).read_text("utf-8"))
        given = {k.lower(): v for k, v in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise InputError(f"--map {path}: not a JSON object of folder name: class") from None
    binary = "Malignant" in given.values() and "Malignant" not in classes
    allowed = MALIGNANT if binary else classes
    if binary and "Benign" not in classes:
        raise InputError(f"--map {path}: the run knows no Benign to tell Malignant from")
    for name, target in given.items():
        if target not in allowed:
            raise InputError(f"--map {path}: {name!r} is mapped to {target!r}, not one of "
                             f"{', '.join(allowed)}")
    return given


def label_of(file: Path, root: Path | None, names: dict[str, str]) -> str:
    """The class named by the nearest folder above the file, up to the given one; "" for none."""
    if root is None:
        return ""
    parts = [root.resolve().name, *file.relative_to(root).parent.parts]
    meant = (names.get(part, names.get(part.lower())) for part in map(composed, reversed(parts)))
    return next(filter(None, meant), "")


def from_table(listed: table.Table, args, files: list[Path],
               names: dict[str, str]) -> tuple[list[Path], list[str]]:
    """The files of the one given folder, with the classes that the table's labels mean; "" for a
    row without a label, or one that the run does not know."""
    if len(args.paths) != 1 or not Path(args.paths[0]).is_dir() or "label" not in listed.columns:
        raise InputError("--table: needs a column label, and one folder that its paths belong to")
    rows = table.match(listed, files, [Path(args.paths[0])])
    unlisted = [str(file) for i, file in enumerate(files) if i not in rows]
    if unlisted and not args.skip_unlisted:
        raise listed.wrong("image(s) are not in it (--skip-unlisted goes on without)", unlisted)
    labels = {i: row["label"] for i, row in rows.items()}
    known = {i: names.get(composed(text), names.get(composed(text).lower(), ""))
             for i, text in labels.items()}
    if foreign := sorted({text for i, text in labels.items() if text and not known[i]}):
        warn(f"note: {listed.name}: label(s) that the run does not know: {', '.join(foreign)}")
    return [files[i] for i in sorted(rows)], [known[i] for i in sorted(rows)]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T whose softmax(logits / T) has the lowest cross-entropy, e⁻³ to e³ (Guo et al. 2017)."""
    def loss(log_t: float) -> float:
        scaled = log_softmax(logits / np.exp(log_t), axis=1)
        return -scaled[np.arange(len(labels)), labels].mean()
    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def temperature(folder: Path) -> float:
    """`temperature.json` of the run; fitted on its validation predictions if not yet there."""
    path = folder / "temperature.json"
    if not path.exists():
        val = finished.read_predictions(folder, "val")
        if (val.logits.argmax(1) == val.labels).all():
            raise InputError("--calibrate: every validation image is right; no temperature follows")
        value = fit_temperature(val.logits, val.labels)
        both = [metrics.measure(val.logits / t, val.labels, val.classes) for t in (1.0, value)]
        run_folder.write_json(path, {
            "temperature": value, "fitted_on": "validation part", "n": len(val.labels),
            **{key: [found[key] for found in both] for key in ("loss", "ece")}})
    return run_folder.read_json(path)["temperature"]


def predict(trained: inference.Trained, files: list[Path],
            t: float) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """(logits [n, C], NaN where unreadable; seconds per image in the network; what was unreadable)
    Decoding runs in threads, a chunk at a time, so that memory does not grow with the number."""
    out = np.full((len(files), len(trained.classes)), np.nan)
    seconds, bad = np.full(len(files), np.nan), {}
    with tqdm(total=len(files), desc="predicting", unit="image", disable=None) as bar:
        for start in range(0, len(files), data.EVAL_BATCH):
            chunk = files[start:start + data.EVAL_BATCH]
            decoded = dict(enumerate(decode_all(chunk, trained.image_size), start))
            bad |= {i: x for i, x in decoded.items() if isinstance(x, str)}
            if good := [i for i in decoded if i not in bad]:
                batch = torch.from_numpy(np.stack([decoded[i][0] for i in good]))
                batch = interventions.apply(batch.permute(0, 3, 1, 2), trained.interventions)
                began = time.perf_counter()
                out[good] = inference.logits(trained, batch).numpy() / t
                seconds[good] = (time.perf_counter() - began) / len(good)
            bar.update(len(chunk))
    return out, seconds, bad


def evaluate(logits: np.ndarray, labels: list[str], classes: list[str],
             binary: bool = False) -> dict | None:
    """Full metrics over the labelled images; None without labels. binary: the labels tell Malignant
    from Benign only, and all classes but Benign are malignant."""
    known = [i for i, label in enumerate(labels) if label and np.isfinite(logits[i]).all()]
    if not known:
        return None
    logits = logits[known]
    if binary:
        benign = classes.index("Benign")
        rest = np.logaddexp.reduce(np.delete(logits, benign, axis=1), axis=1)
        logits, classes = np.stack([logits[:, benign], rest], 1), MALIGNANT
    return metrics.measure(logits, np.array([classes.index(labels[i]) for i in known]), classes)


def write_csv(path: Path, files: list[Path], labels: list[str], logits: np.ndarray,
              seconds: np.ndarray, classes: list[str]) -> None:
    rows = [["path", "prediction", *(f"p_{c}" for c in classes), "seconds", "label"]]
    for i in np.flatnonzero(np.isfinite(seconds)):
        p = np.exp(logits[i] - np.logaddexp.reduce(logits[i]))
        rows.append([files[i], classes[p.argmax()], *(f"{x:.9g}" for x in p),
                     f"{seconds[i]:.6f}", labels[i]])
    run_folder.write_csv(path, rows)


@contextmanager
def reserved(out: str | None, default: Path, companion: str) -> Iterator[Path]:
    """The name of a file to write: `out`, or the default, numbered if taken. Held by an empty file
    until it is written, so that two processes never take one name; free again if the work fails.
    companion: suffix of a second file that is written beside. Raises InputError before any work."""
    if out and not Path(out).name:
        raise InputError(f"--out {out}: not the name of a file")
    for number in itertools.count(1):
        number = f"-{number}" if number > 1 else ""
        path = Path(out) if out else default.with_name(f"{default.stem}{number}{default.suffix}")
        taken = [p for p in (path, path.with_suffix(companion))
                 if p.exists() or p.is_symlink()]  # a link that leads nowhere is in the way, too
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


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add("paths", nargs="+", metavar="PATH", help="image files or folders")
    add("--out", metavar="CSV", help="default: RUN/predicted.csv, numbered if taken")
    add("--exact", action="store_true", help="float32, nothing folded")
    add("--calibrate", action="store_true", help="temperature scaling, fitted on the run's "
        "validation part and stored with the run")
    add("--map", metavar="JSON", help="folder name → class of the run, or Malignant and Benign "
        "(Malignant: all other classes, their probabilities summed)")
    table.add_arguments(add)
    inference.add_arguments(parser)
    args = parser.parse_args(argv)
    folder = Path(args.run)
    trained = inference.load(folder, models.pick_device(args.device), args.client)
    names, found = read_map(args.map, trained.classes), find(args.paths)
    files, labels = [f for f, _ in found], [label_of(f, root, names) for f, root in found]
    if (listed := table.chosen(args)) is not None:
        files, labels = from_table(listed, args, files, names)
    with reserved(args.out, folder / "predicted.csv", ".json") as out:
        t = temperature(folder) if args.calibrate else 1.0
        logits, seconds, bad = predict(trained if args.exact else inference.fast(trained), files, t)
        write_csv(out, files, labels, logits, seconds, trained.classes)
        figures = evaluate(logits, labels, trained.classes, binary=not {*names.values()} <= {
            *trained.classes})
        if figures is not None:
            run_folder.write_json(out.with_suffix(".json"), figures)
    unnamed = figures is None and listed is None and any(
        root and file.parent != root for file, root in found)
    print(f"{len(files) - len(bad)} images to {out}" + (f", temperature {t:.3f}" if t != 1 else "")
          + (", none in a folder named after a class of the run" if unnamed else ""))
    if figures is not None:
        unlabelled = len(files) - len(bad) - figures["n"]
        terminal.print_table(["n", "accuracy (95 %)", "macro F1", "kappa", "AUC", "loss", "ECE"], [[
            figures["n"], terminal.show(figures["accuracy"]),
            *(terminal.show(figures[k]) for k in ("macro_f1", "kappa", "roc_auc", "loss", "ece"))]])
        print(f"all figures: {out.with_suffix('.json')}"
              + (f"; {unlabelled} images without a known class left out" if unlabelled else ""))
    for i, reason in sorted(bad.items()):
        warn(f"unreadable: {files[i]} ({reason})")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    guard(main)
