"""A table beside the images: one CSV row an image says what its folder does not.

    path,label,patient,split,client
    scans/0001.png,Pro,P17,train,NORTH

`path` is needed; `label`, `patient`, `group`, `split` and `client` are used where they are there.
A column with another heading is named by --columns path=imagename patient=patientid.
"""

from checks import InputError, warn

import argparse
import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.files import PARTS, Found, class_names, composed
from dataset.images import UNITS

COLUMNS = ("path", "label", "patient", "group", "split", "client")
UNKNOWN = {"NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null"}  # as R, pandas, Excel write
WORDS = PARTS | {"dropped": "dropped", "val+test": "val+test"}  # and those of split.csv


@dataclass(frozen=True)
class Table:
    """The rows of a table by their path; every row has the values of the same columns."""
    name: str  # --table and the file, for messages
    columns: tuple[str, ...]  # of COLUMNS, those that it has
    rows: dict[str, dict[str, str]]

    def wrong(self, what: str, which: list[str]) -> InputError:
        """The error for all of these paths: their number, and the first three."""
        return InputError(f"{self.name}: {len(which)} {what}: {', '.join(which[:3])}"
                          + (", ..." if len(which) > 3 else ""))


def add_arguments(add) -> None:
    """The flags of a table, for a parser or a group of one. add: its `add_argument`."""
    add("--table", metavar="CSV", help="a row an image: path, and any of label, patient, group, "
        "split, client")
    add("--columns", nargs="+", metavar="NAME=HEADING", help="other headings of these columns, "
        "such as path=imagename")
    add("--skip-unlisted", action="store_true", help="leave out images that the table does not "
        "name")


def chosen(args: argparse.Namespace) -> Table | None:
    """The table that the flags name, or None."""
    if args.table is None and (args.columns or args.skip_unlisted):
        raise InputError("--columns and --skip-unlisted belong to --table")
    return None if args.table is None else read(args.table, args.columns)


def read(path: str, headings: list[str] | None = None) -> Table:
    """The table of a CSV file: Unicode, separated by commas, semicolons or tabs, as its header is.
    headings: NAME=HEADING for columns that are called otherwise there. Raises InputError for a
    file that is no such table, and for rows that contradict each other or cannot be understood."""
    name = f"--table {path}"
    raw = Path(path).read_bytes()
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # Excel has both
    try:
        text = io.StringIO(raw.decode(encoding, "surrogateescape"), newline="").readlines()
        readings = [[row for row in csv.reader(text, delimiter=d, skipinitialspace=True)
                     if any(map(str.strip, row))] for d in ",;\t"]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not a CSV file ({error})") from None
    lines = max(readings, key=lambda rows: len(rows[0]) if rows else 0)
    header = [heading.strip() for heading in lines[0]] if lines else []
    places = _find_columns(name, header, headings or [])
    table = Table(name, tuple(places), {})
    twice, unknown = [], []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise InputError(f"{name}: row {number} (blank lines not counted) has {len(line)} "
                             f"fields, the header has {len(header)}")
        row = {column: "" if (value := line[i].strip()) in UNKNOWN else value
               for column, i in places.items() if column != "path"}
        if re.search(r"[\udc80-\udcff]", "".join(row.values())):
            raise InputError(f"{name}: row {number} is not Unicode; save the table as CSV UTF-8")
        key = line[places["path"]]
        if re.fullmatch(r"fold\d+", row.get("split", "")):
            raise InputError(f"{name}: the folds of a cross-validation, no single split; name one "
                             f"of them: {Path(path).parent / row['split'] / 'split.csv'}")
        if "split" in row:
            unknown += [f"{key} ({row['split']!r})"] if row["split"].lower() not in WORDS else []
            row["split"] = WORDS.get(row["split"].lower())
        twice += [key] if key in table.rows else []
        table.rows[key] = row
    if twice:
        raise table.wrong("path(s) are named twice", twice)
    if unknown:
        raise table.wrong("row(s) with an unknown split, not train, val or test", unknown)
    if not table.rows:
        raise InputError(f"{name}: no row under the header")
    if other := [h for i, h in enumerate(header) if h and i not in places.values()]:
        warn(f"note: {name}: columns that are not used: {', '.join(other)}")
    return table


def _find_columns(name: str, header: list[str], headings: list[str]) -> dict[str, int]:
    """Column → its place in the header."""
    wanted = {column: column for column in COLUMNS}
    for item in headings:
        column, _, heading = item.partition("=")
        if column not in COLUMNS or not heading:
            raise InputError(f"--columns {item}: must be NAME=HEADING, NAME one of "
                             f"{', '.join(COLUMNS)}")
        if heading not in header:
            raise InputError(f"--columns {item}: {name} has the headings {', '.join(header)}")
        wanted[column] = heading
    if wanted["path"] not in header:
        raise InputError(f"{name}: no column path; its headings are {', '.join(header)} "
                         "(--columns path=HEADING says which one it is)")
    if several := [h for h in wanted.values() if header.count(h) > 1]:
        raise InputError(f"{name}: the heading {several[0]} stands there twice")
    for heading in set(header) - set(wanted.values()):  # patients must not go unused by a slip
        column = heading.strip(' "').lower()
        if column in COLUMNS and wanted[column] not in header:
            raise InputError(f"{name}: the heading {heading} is not quite {column}; rename it, or "
                             f"say which it is with --columns '{column}={heading}'")
    return {column: header.index(h) for column, h in wanted.items() if h in header}


def match(table: Table, files: list[Path], places: Sequence[Path]) -> dict[int, dict[str, str]]:
    """The row of each file that the table names, by the file's number. A path is tried in each of
    the folders `places`; then as a name without folder, then without suffix, where exactly one file
    fits (a note counts these). InputError for a row of no file or several, and two rows of one."""
    whole, by_name, by_stem = {}, defaultdict(list), defaultdict(list)
    for i, file in enumerate(map(Path, map(composed, map(str, files)))):
        whole[str(file)] = i
        by_name[file.name].append(i)
        by_stem[file.stem].append(i)
    found, none, several, moved = [], [], [], []
    for path in table.rows:
        variants = composed(path), composed(path).replace("\\", "/")
        last = variants[1].rsplit("/", 1)[-1]
        exact = [whole[p] for p in (composed(str(place / v)) for v in variants for place in places)
                 if p in whole]
        named = exact[:1] or by_name.get(variants[1]) or by_stem.get(variants[1])
        fits = named or by_name.get(last) or by_stem.get(last) or by_stem.get(Path(last).stem) or []
        moved += [path] if fits and not named else []
        found += fits[:1]
        none += [path] if not fits else []
        several += [f"{path} ({len(fits)} files)"] if len(fits) > 1 else []
    if none:
        raise table.wrong(f"path(s) are no image under {places[0]}", none)
    if several:
        raise table.wrong("path(s) are no file, and as names fit several", several)
    if twice := [str(files[i]) for i, count in Counter(found).items() if count > 1]:
        raise table.wrong("file(s) are named by several rows", twice)
    if moved:
        warn(f"note: {table.name}: {len(moved)} path(s) are no file and were met by their name "
             f"alone, such as {moved[0]}")
    return dict(zip(found, table.rows.values(), strict=True))


def apply(table: Table, found: Found, skip_unlisted: bool, classes: list[str] | None) -> Found:
    """The images that the table names, with what it says of them, in the order of `found`.
    classes: the class list of a federation. Raises InputError for images that it does not name,
    unless they are skipped, and where it leaves one class only."""
    rows, base = match(table, found.files, found.places), found.base
    if all(found.files[i].is_relative_to(found.places[-1]) for i in rows):
        base = found.places[-1]  # the folder that holds the class folders, as without a table
    inside = [i for i, file in enumerate(found.files) if file.is_relative_to(base)]
    unlisted = [found.files[i].relative_to(base).as_posix() for i in inside if i not in rows]
    if unlisted and not skip_unlisted:
        raise table.wrong("image(s) are not in it (--skip-unlisted goes on without)", unlisted)
    labels = {i: row.get("label", found.labels[i]) for i, row in rows.items()}
    keep = [i for i in inside if labels.get(i)]
    left = {"not in it": len(unlisted), "without a label": len(rows) - len(keep)}
    for why, count in left.items():
        if count:
            warn(f"note: {table.name}: {count} image(s) {why} are left out")
    if "label" in table.columns:
        names = class_names(sorted({labels[i] for i in keep}), classes, table.name)
        labels = {i: names[labels[i]] for i in keep}
    elif classes is None and len({labels[i] for i in keep}) < 2:
        raise InputError(f"{table.name}: it leaves one class only, nothing to tell apart")
    known = {c: [values[i] for i in keep] for c, values in found.known.items()} | {
        c: [rows[i][c] for i in keep] for c in table.columns if c not in ("path", "label")}
    for unit in UNITS:
        both = defaultdict(set)
        for i, value in zip(keep, known.get(unit, keep), strict=True):
            both[value].add(labels[i])
        if mixed := [str(v) for v, several in both.items() if v != "" and len(several) > 1]:
            warn(f"note: {table.name}: {len(mixed)} {unit}(s) with images of several classes, "
                 f"such as {mixed[0]}")
        if len({str(value).casefold() for value in both}) < len(both):
            warn(f"note: {table.name}: {unit}s whose names differ by case alone")
    return Found(base, [found.files[i] for i in keep], [labels[i] for i in keep], known,
                 found.ignored)
