"""Promises about the source itself: every flag is read, sizes hold, no network host, no import."""

import ast
import re
from pathlib import Path

import pytest

from reporting.run_folder import ROOMS

ROOT = Path(__file__).parent.parent
FILES = [f for room in ("", *ROOMS) for f in sorted((ROOT / room).glob("*.py"))]
TREES = {f.relative_to(ROOT).as_posix(): ast.parse(f.read_text("utf-8")) for f in FILES}
SCRIPTS = {"train_federated", "train_central", "explain", "predict", "compare", "audit"}


def test_every_flag_is_read_somewhere():
    """A flag counts as read where `args.name` is, or where a dataclass field takes it by name."""
    read, defined, fields = set(), set(), set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "args":
                read.add(node.attr)
            if (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
                    and getattr(node.args[0], "id", "") == "args"):
                read.add(getattr(node.args[1], "value", None))
            if isinstance(node, ast.ClassDef) and node.name == "Recipe":
                fields = {x.target.id for x in node.body if isinstance(x, ast.AnnAssign)}
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                text = node.args[0].value
                if isinstance(text, str) and re.fullmatch("--[a-z-]+", text):
                    defined.add(text[2:].replace("-", "_"))
    used = {n.attr for n in ast.walk(TREES["fedavg.py"]) if isinstance(n, ast.Attribute)
            and getattr(n.value, "id", "") == "recipe"}
    assert fields and fields <= used, fields - used
    assert len(defined) > 35 and defined <= read | fields, defined - read - fields


def test_no_flag_of_type_bool():
    assert not [f.name for f in FILES if re.search(r"\btype\s*=\s*bool", f.read_text("utf-8"))]


@pytest.mark.parametrize("name", TREES)
def test_files_and_functions_keep_their_size(name):
    text = (ROOT / name).read_text("utf-8")
    assert text.count("\n") <= (250 if name == "fedavg.py" else 400)
    assert max(map(len, text.splitlines())) <= 100
    assert ast.get_docstring(TREES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            given = node.args
            assert len(given.posonlyargs + given.args + given.kwonlyargs) <= 9, node.name
            assert given.kwarg is None or name == "models.py", node.name


# From the bottom up. A file imports files of its own level or lower ones, but no script.
LEVELS = [{"checks"}, {"models", "dataset"}, {"data"}, {"fedavg", "reporting"}, {"training"},
          {"auditing", "explaining"}, SCRIPTS]


def imported(tree):
    """Names of modules that are imported, "room.part" for a part of a room."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            if node.module in ROOMS:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_arrows_go_one_way():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    assert set(level) == {Path(name).parts[0].removesuffix(".py") for name in TREES}
    for name, tree in TREES.items():
        own = Path(name).parts[0].removesuffix(".py")
        for other in {x.partition(".")[0] for x in imported(tree)} & set(level) - {own}:
            assert level[other] < level[own], f"{name} imports {other}"
            assert other not in SCRIPTS, f"{name} imports the script {other}"


def test_the_parts_of_a_room_do_not_import_each_other_in_a_circle():
    graph = {name.removesuffix(".py").replace("/", "."): imported(tree)
             for name, tree in TREES.items()}
    done = set()
    while len(done) < len(graph):
        free = {name for name, needs in graph.items() if needs & set(graph) <= done} - done
        assert free, set(graph) - done
        done |= free
