"""Copies what anyone can recompute of a run to results/: no pixels, no weights, no machine's paths.

    python benchmarks/publish.py runs/NAME [runs/OTHER ...] --to results

Of a run, and of each fold or client in it: run.json, results.json, history.jsonl, split.csv,
predictions.csv, and what `audit.py run` and `audit.py privacy` measured. `python compare.py
results/A results/B` then gives the published table.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from checks import InputError, guard, make_parser

import json
import re
import shutil

NAMING = ("run.json", "privacy/privacy.json")  # these hold paths of the machine
FILES = (*NAMING, "results.json", "history.jsonl", "split.csv", "predictions.csv",
         "audit/audit.json")


def without_paths(value):
    """The same JSON with every absolute path, alone or after `=`, cut to its last name."""
    if isinstance(value, dict):
        return {key: without_paths(x) for key, x in value.items()}
    if isinstance(value, list):
        return [without_paths(x) for x in value]
    if isinstance(value, str) and "/" in value:
        name, equals, path = value.rpartition("=")
        return name + equals + Path(path).name if Path(path).is_absolute() else re.sub(
            r"(?<![\w.])/[^\s'\"]*/", "", value)  # in a sentence
    return value


def publish(run: Path, place: Path) -> None:
    """Copy the run to the new folder `place`. InputError for one that is not complete."""
    if not (run / "results.json").exists():
        raise InputError(f"{run}: the run is not complete, it has no results.json")
    if place.exists():
        raise InputError(f"{place}: exists already")
    for source in sorted(run.rglob("run.json")):
        folder = place / source.parent.relative_to(run)
        for name in FILES:
            there, here = source.parent / name, folder / name
            if not there.exists():
                continue
            here.parent.mkdir(parents=True, exist_ok=True)
            if name in NAMING:
                content = without_paths(json.loads(there.read_text("utf-8")))
                indent = 1 if name == "run.json" else None  # not a line for each point of a curve
                here.write_text(json.dumps(content, indent=indent) + "\n", "utf-8")
            else:
                shutil.copyfile(there, here)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--to", metavar="DIR", default="results", help="default: results")
    args = parser.parse_args()
    for run in map(Path, args.runs):
        publish(run, Path(args.to) / run.name)


if __name__ == "__main__":
    guard(main)
