"""Every command in the texts parses; every cited figure is the one in results/."""

import argparse
import functools
import importlib
import json
import re
import runpy
from pathlib import Path

import pytest

from reporting.metrics import wilson

ROOT = Path(__file__).parent.parent
CLAIMS = (ROOT / "CLAIMS.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
LESSONS = (ROOT / "LESSONS.md").read_text("utf-8")
FILES = dict(re.findall(r"`([A-Z])` = `(results/[^`]+)`", CLAIMS))


@functools.lru_cache
def read(path):
    return json.loads((ROOT / path).read_text("utf-8"))


def resolve(source, key):
    """The number that a citation names."""
    if counts := re.fullmatch(r"W\((\d+)/(\d+)\)", source):
        return wilson(*map(int, counts.groups()))[key]
    value = read(FILES.get(source, source))
    for part in key.split("/"):
        value = value[int(part) if isinstance(value, list) else part]
    return value


def same(text, value):
    """Whether `text` is `value` rounded to the digits that it shows."""
    percent, text = text.endswith("%"), text.replace("−", "-").replace(",", "").rstrip(" %")
    digits = len(text.partition(".")[2])
    return round(value * (100 if percent else 1), digits) == float(text)


CITED = re.findall(r"([−-]?[\d.,]*\d(?: %)?) \[([A-Z](?:\(\d+/\d+\))?) ([^\]]+)\]", CLAIMS)


def test_every_figure_of_the_claims_resolves_and_rounds():
    assert len(CITED) > 50 and len(CITED) == CLAIMS.count("]")
    wrong = [(text, source, key, resolve(source, key)) for text, source, key in CITED
             if not same(text, resolve(source, key))]
    assert not wrong


def test_same_can_fail():
    assert same("0.9938", 0.99384) and same("94.0 %", 0.94) and same("−0.0154", -0.01538)
    assert not same("0.9938", 0.9937) and not same("94.0 %", 0.95) and not same("77", 78)


def test_every_cited_figure_of_the_readme_resolves_and_rounds():
    """A line ends in `<!-- file: key; key -->`: each fraction on it, in order, is that figure; a
    key of a figure with interval stands for its value, low and high, of a mean for mean and sd."""
    lines = [line for line in README.splitlines() if "<!-- results/" in line]
    assert len(lines) >= 20
    for line in lines:
        text, _, note = line.partition("<!-- ")
        path, _, keys = note.removesuffix(" -->").partition(": ")
        values = []
        for key in keys.split("; "):
            found = resolve(path, key)
            kinds = ("value", "low", "high"), ("mean", "sd")
            values += ([found[k] for kind in kinds for k in kind if k in found]
                       if isinstance(found, dict) else [found])
        shown = re.findall(r"[−-]?\d\.\d{3,4}\b", text.replace("–", " "))
        assert len(shown) == len(values), line
        assert all(same(a, b) for a, b in zip(shown, values, strict=True)), (line, values)


def test_no_table_row_of_results_goes_without_a_source():
    section = README.partition("## Results")[2].partition("## The paper's figures")[0]
    for line in section.splitlines():
        if line.startswith("|") and re.search(r"\d\.\d{3,4}", line):
            assert "<!-- results/" in line or "as published" in line, line


class Parsed(Exception):
    pass


COMMANDS = sorted({c for text in (CLAIMS, README, LESSONS) for c in
                   re.findall(r"(?:^|[`/ ])((?:python|torchrun) [^`\n#|]*?\.py[^`\n#|]*)", text,
                              re.MULTILINE)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch, tmp_path):
    """Up to the point where arguments are read, and no further."""
    words = command.replace("...", "").split()
    place = next(i for i, w in enumerate(words) if w.endswith(".py"))
    original = argparse.ArgumentParser.parse_args

    def parse(self, *a, **k):
        original(self, *a, **k)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr("sys.argv", words[place:])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit if "--help" in words else Parsed):
        if words[place].startswith("benchmarks/"):
            runpy.run_path(str(ROOT / words[place]), run_name="main")["main"]()
        else:
            importlib.import_module(words[place].removesuffix(".py")).main()


def test_the_readme_names_every_script():
    for file in ROOT.glob("*.py"):
        assert f"`{file.name}`" in README or f"{file.name} " in README, file.name
    assert len(COMMANDS) > 30
