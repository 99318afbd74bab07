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
README, SECURITY, CLAIMS, LESSONS, RESULTS, READINGS, RUN_FOLDER = TEXTS = [
    (ROOT / name).read_text("utf-8") for name in (
        "README.md", "SECURITY.md", "docs/claims.md", "docs/lessons.md", "docs/results.md",
        "docs/readings.md", "docs/run-folder.md")]
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


@pytest.mark.parametrize(("page", "least"), [(README, 4), (RESULTS, 20)])
def test_every_cited_figure_resolves_and_rounds(page, least):
    """A line ends in `<!-- file: key; key -->`: each fraction on it, in order, is that figure; a
    key of a figure with interval stands for its value, low and high, of a mean for mean and sd."""
    lines = [line for line in page.splitlines() if "<!-- results/" in line]
    assert len(lines) >= least
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


@pytest.mark.parametrize("section", [
    RESULTS.partition("## The paper's figures")[0],
    README.partition("## The result in five rows")[2].partition("## Set up")[0]])
def test_no_table_row_of_results_goes_without_a_source(section):
    rows = [line for line in section.splitlines()
            if line.startswith("|") and re.search(r"\d\.\d{3,4}", line)]
    assert len(rows) >= 5
    for line in rows:
        assert "<!-- results/" in line or "as published" in line, line


def test_the_readme_is_short_and_quotes_the_round_loop_as_it_is():
    assert README.count("\n") <= 165
    quoted = README.partition("```python\n")[2].partition("```")[0]
    source = (ROOT / "train_federated.py").read_text("utf-8")
    body = source.partition("def train(")[2].partition("\ndef ")[0]
    lines = [line.strip() for line in quoted.splitlines() if line.strip()]
    assert len(lines) > 10
    place = 0
    for line in lines:  # every line, in this order
        place = body.index(line, place) + len(line)
    assert "job.collect" in quoted and "average.result()" in quoted


def test_links_of_the_texts_lead_somewhere():
    found = [(page, target) for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
             for target in re.findall(r"\]\(([^):#]+)\)", page.read_text("utf-8"))]
    assert len(found) >= 6
    assert not [target for page, target in found if not (page.parent / target).exists()]


class Parsed(Exception):
    pass


PATTERN = r"(?:^|[`/ ])((?:python|torchrun) (?:-m reporting|[^`\n#|]*?\.py)[^`\n#|]*)"
COMMANDS = sorted({c for text in TEXTS for c in re.findall(PATTERN, text, re.MULTILINE)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch, tmp_path):
    """Up to the point where arguments are read, and no further."""
    words = command.replace("...", "").split()
    place = next(i for i, w in enumerate(words) if w.endswith(".py") or w.startswith("reporting."))
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
        assert f"{file.name}" in README or file.name == "checks.py", file.name
    assert len(COMMANDS) > 30
