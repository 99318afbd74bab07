"""Promises about the source itself: every flag is read, sizes hold, no network host, no import."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reporting.provenance import ROOMS

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
            assert given.kwarg is None, node.name
        if isinstance(node, ast.ClassDef) and node.name == "WeightedAverage":
            assert node.end_lineno - node.lineno < 30


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


BENCHMARKS = {f"benchmarks/{f.name}": ast.parse(f.read_text("utf-8"))
              for f in (ROOT / "benchmarks").glob("*.py")}
SHARED = {f"tests/{name}": ast.parse((ROOT / "tests" / name).read_text("utf-8"))
          for name in ("conftest.py", "helpers.py")}  # loaded before any test
THREADED = {"torch", "torchvision", "sklearn", "skimage", "lime"}  # packages that load libgomp


def loaded(name, trees):
    """The modules that a file loads when it is started, in order: at its top level, not inside
    functions; of a package its __init__.py first."""
    order = []

    def load(module):
        parts = module.split(".")
        for dotted in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            if dotted not in order:
                order.append(dotted)
                base = dotted.replace(".", "/")
                walk(next((trees[f] for f in (f"{base}.py", f"{base}/__init__.py") if f in trees),
                          ast.Module([], [])))

    def walk(tree):
        for node in tree.body:
            for alias in getattr(node, "names", []):
                if isinstance(node, ast.Import):
                    load(alias.name)
                if isinstance(node, ast.ImportFrom):
                    load(node.module)
                    if f"{node.module}/{alias.name}.py" in trees:
                        load(f"{node.module}.{alias.name}")
    for room in name.split("/")[:-1]:
        load(room)
    walk(trees[name])
    return order


@pytest.mark.parametrize("name", [*TREES, *BENCHMARKS, *SHARED])
def test_whatever_is_started_or_imported_first_loads_checks_before_torch(name):
    trees = TREES | BENCHMARKS | SHARED
    order = loaded(name, trees | {"helpers.py": trees["tests/helpers.py"]})
    threaded = [i for i, module in enumerate(order) if module in THREADED]
    assert name == "checks.py" or not threaded or order.index("checks") < threaded[0], order


# Says what stands in the environment at the moment that a package of THREADED is first looked for.
WATCH = f"""
import os, runpy, sys
class Watch:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {THREADED}:
            print([os.environ.get(x) for x in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")])
            sys.exit()
sys.meta_path.insert(0, Watch)
runpy.run_module(sys.argv.pop(1), run_name=sys.argv.pop(1))
"""


@pytest.mark.parametrize(("module", "run_name", "given", "expected"), [
    ("train_federated", "train_federated", {}, ["1000", None]),
    ("train_central", "__main__", {}, ["1000", None]),
    ("reporting.architecture", "__main__", {}, ["1000", None]),
    ("dataset.augment", "x", {}, ["1000", None]), ("torch", "x", {}, [None, None]),
    ("train_federated", "x", {"GOMP_SPINCOUNT": "7"}, ["7", None]),
    ("train_federated", "x", {"OMP_WAIT_POLICY": "active"}, [None, "active"]),
    ("benchmarks.contention", "__main__ --work resnet50 scripts 1", {}, ["1000", None]),
    ("benchmarks.contention", "__main__ --work resnet50 libgomp 1", {}, [None, None])])
def test_threads_do_not_spin_unless_the_user_says_so(module, run_name, given, expected):
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", WATCH, module, *run_name.split()], cwd=ROOT,
                          env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


def test_the_parts_of_a_room_do_not_import_each_other_in_a_circle():
    graph = {name.removesuffix(".py").replace("/", "."): imported(tree)
             for name, tree in TREES.items()}
    done = set()
    while len(done) < len(graph):
        free = {name for name, needs in graph.items() if needs & set(graph) <= done} - done
        assert free, set(graph) - done
        done |= free


def test_the_top_level_is_the_list_and_every_room_is_a_package():
    top = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.partition("/")[0] for name in top.stdout.splitlines()} == {
        *(f"{name}.py" for name in [*SCRIPTS, "fedavg", "data", "models", "checks"]), *ROOMS,
        "README.md", "SECURITY.md", "LICENSE", "requirements.txt", "constraints.txt",
        "pyproject.toml", ".gitignore", ".ci", "docs", "results", "benchmarks", "tests"}
    for room in ROOMS:
        lines = (ROOT / room / "__init__.py").read_text("utf-8").splitlines()
        assert lines[0].startswith('"""') and lines[0].endswith('"""')
        assert lines[1:] == ["", "import checks  # noqa: F401 - before torch"]


def lines_of(name):
    return (ROOT / name).read_text("utf-8").count("\n")


def test_the_house_keeps_its_size():
    """The core is all that can change a number: what train_federated.py imports, less the report,
    the figures and what a run prints."""
    graph = {name: imported(tree) for name, tree in TREES.items()}
    core, todo = set(), ["train_federated.py"]
    while todo:
        name = todo.pop()
        if name in core or name in ("reporting/report.py", "reporting/figures.py",
                                    "reporting/terminal.py"):
            continue
        core.add(name)
        todo += [path for x in graph[name] if (path := x.replace(".", "/") + ".py") in TREES]
    # the design asks for 3,400 and 6,100; parts I to L took more, and none may be added
    assert sum(map(lines_of, core)) <= 3472
    assert sum(map(lines_of, TREES)) <= 7335
    assert sum(map(lines_of, ["fedavg.py"])) <= 250 and lines_of("training/processes.py") <= 300
