"""What users do to runs: move data, start twice, close the terminal, bring few images."""

import checks
from checks import InputError

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BASE, ROOT, Process, same_run, script, train, write_tree

import audit
import compare
import data
import explain
import models
import train_central
import train_federated
from dataset import parts, splits
from reporting import baselines, finished, run_folder

QUICK = ["--per-class", "1", "--samples", "20", "--steps", "2", "--lime-seeds", "2"]


# ---- data that were moved -----------------------------------------------------------------------

@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run whose data folder, given by a relative name, was moved afterwards."""
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "here", {"Benign": 22, "Early": 26}, size=32)
    out = train("here", tmp_path / "run", "--rounds", 1, "--image-size", 32)
    monkeypatch.chdir("/")  # another working directory does not matter
    assert finished.load_images(out)[1].paths
    (tmp_path / "here").rename(tmp_path / "there")
    return out, str(tmp_path / "there")


def test_every_script_that_reads_the_images_of_a_run_takes_data(moved, tmp_path):
    out, there = moved
    for call in (lambda *more: explain.main([str(out), *QUICK, *more]),
                 lambda *more: audit.main(["run", str(out), *more])):
        with pytest.raises(InputError, match="no such folder.*--data DIR"):
            call()
        call("--data", there)
    with pytest.raises(InputError, match="no such folder"):
        train_federated.main(["--resume", str(out)])
    before = (out / "predictions.csv").read_bytes()
    train_federated.main(["--resume", str(out), "--data", there])
    assert (out / "predictions.csv").read_bytes() == before
    train_central.main(["--like", str(out), "--data", there, "--out", str(tmp_path / "like")])
    write_tree(tmp_path / "other", {"Benign": 22, "Early": 26}, size=32, seed=9)
    for call in (lambda: explain.main([str(out), "--data", str(tmp_path / "other")]),
                 lambda: audit.main(["run", str(out), "--data", str(tmp_path / "other")]),
                 lambda: train_federated.main(["--resume", str(out), "--data",
                                               str(tmp_path / "other")])):
        with pytest.raises(InputError, match="not those of the run"):
            call()


def test_a_second_explanation_leaves_the_first_alone(moved):
    out, there = moved
    explain.main([str(out), "--data", there, *QUICK])
    (out / "explanations" / "notes.txt").write_text("mine")
    page = (out / "report.md").read_text()
    first = next((out / "explanations").glob("*.csv")).read_bytes()
    some = next(p for p in sorted((ROOT / there).rglob("*.png")))
    explain.main([str(out), "--images", str(some), *QUICK])
    assert (out / "explanations" / "notes.txt").read_text() == "mine"
    assert next((out / "explanations").glob("*.csv")).read_bytes() == first
    assert (out / "explanations-2" / "report.md").exists()
    assert (out / "report.md").read_text() == page  # n = 1 is no verdict over the test images


def test_a_run_goes_on_from_another_directory_and_without_its_first_weights(
        tree, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    models.save(models.build("toynet", 3, seed=5).state_dict(), Path("start.pt"))
    train(tree, "run", "--rounds", 1, "--weights", "start.pt")
    before = (tmp_path / "run" / "model.pt").read_bytes()
    recorded = json.loads(Path("run/run.json").read_text("utf-8"))["arguments"]
    assert recorded["weights"] == str(tmp_path / "start.pt")
    monkeypatch.chdir(tmp_path / "other")
    for _ in range(2):
        train_federated.main(["--resume", "../run"])
        assert (tmp_path / "run" / "model.pt").read_bytes() == before
        (tmp_path / "start.pt").unlink(missing_ok=True)


def test_an_explanation_that_fails_leaves_nothing_half_done(moved, monkeypatch):
    out, there = moved

    def fails(*args):
        raise OSError("No space left on device")
    before = sorted(p.name for p in out.iterdir())
    monkeypatch.setattr("explain.write_table", fails)
    with pytest.raises(OSError, match="No space"):
        explain.main([str(out), "--data", there, *QUICK])
    assert sorted(p.name for p in out.iterdir()) == before


# ---- two at once --------------------------------------------------------------------------------

def test_a_folder_that_is_written_is_locked_and_free_again(tree, short, tmp_path):
    out = shutil.copytree(short, tmp_path / "run")
    with run_folder.resumable(out):
        done = script("--resume", out)
        assert done.returncode == 2 and "another process is writing there" in done.stderr
        assert done.stderr.count("\n") == 1
    assert script("--resume", out).returncode == 0
    assert same_run(out, short)


# ---- odd sets -----------------------------------------------------------------------------------

def test_a_hospital_of_one_class_ends_well(tmp_path):
    """Shards of one class: nothing to tell apart for the colour classifiers."""
    root = write_tree(tmp_path / "set", {"a": 30, "b": 30})
    out = train(root, tmp_path / "fed", "--rounds", 1, "--clients", 2, "--partition", "shards",
                "--classes-per-client", 1)
    alone = tmp_path / "alone"
    train_central.main(["--like", str(out), "--local-only", "--out", str(alone)])
    rows = json.loads((alone / "client0" / "results.json").read_text())["colour_only"]
    assert rows and all(row["test"]["value"] is None for row in rows)
    assert (alone / "report.md").exists()


def test_colour_rows_of_a_training_part_of_two_classes_are_numbers():
    pixels = np.zeros((12, 3, 4, 4), np.uint8)
    pixels[6:] = 200
    names = [str(i) for i in range(12)]
    images = data.Images(torch.from_numpy(pixels), torch.arange(12) // 6, names, ["a", "b"], names,
                         "x")
    split = {"train": np.array([0, 1, 6, 7]), "val": np.array([2, 8]), "test": np.array([3, 9])}
    assert {row["test"]["value"] for row in baselines.colour_only(images, split)} == {1.0}


def test_too_few_groups_say_how_many_there_are():
    with pytest.raises(InputError, match="of 3 groups the smallest has 10 images, and a part holds "
                                         "at most 3"):
        splits.make_split("grouped", np.arange(30) % 2, 0, groups=[str(i // 10) for i in range(30)])


def test_a_list_of_sizes_is_cut(tmp_path, capsys):
    from PIL import Image
    for i in range(30):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 20)).save(path)
    args = data.make_parser("x")
    data.add_arguments(args)
    parts.add_client_arguments(args)
    given = args.parse_args(["--data", str(tmp_path), "--image-size", "20"])
    data.describe(given, data.load(given))
    lines = capsys.readouterr().out.splitlines()
    assert sum("x20 RGB" in line for line in lines) == 5
    assert "  and 25 more sizes; smallest 20x20, median 35x20, largest 49x20" in lines


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_names_that_are_no_utf_8_are_read_back_as_they_were_written(tmp_path):
    root = write_tree(tmp_path / "set", {"Benign": 22, "Early": 26}, size=32)
    for folder in ("Benign", "Early"):
        for file in list((root / folder).iterdir()):
            os.rename(os.fsencode(file), os.fsencode(root / folder) + b"/\xe4" +
                      os.fsencode(file.name))
    os.rename(root / "Early", os.fsencode(root) + b"/\xe4rly")
    out = train(root, tmp_path / "run", "--rounds", 1, "--image-size", 32)
    train_central.main(["--like", str(out), "--out", str(tmp_path / "like")])
    train_central.main(["--data", str(root), *[x for x in BASE if x not in (
        "--rounds", "3", "--local-epochs", "1")], "--folds", "2", "--epochs", "1",
        "--out", str(tmp_path / "folds")])
    explain.main([str(out), *QUICK])
    audit.main(["run", str(out)])
    compare.main([str(out), str(tmp_path / "like"), "--out", str(tmp_path / "comparison")])
    assert (tmp_path / "comparison" / "comparison.md").exists()


# ---- terminals ----------------------------------------------------------------------------------

def command(script, *arguments):
    return [sys.executable, str(ROOT / "tests/toy.py"), str(ROOT / script), *map(str, arguments)]


def test_a_closed_pipe_does_not_end_the_work(tree, tmp_path):
    out = tmp_path / "run"
    line = " ".join(command("train_federated.py", "--data", tree, *BASE, "--rounds", 2, "--out",
                            out))
    done = subprocess.run(f"({line}; echo $? >{tmp_path}/code) | head -1", shell=True,
                          capture_output=True, text=True, check=False)
    assert (tmp_path / "code").read_text() == "0\n" and done.stderr == ""
    assert (out / "results.json").exists()


def test_a_terminal_that_is_gone_takes_nothing_and_ends_nothing(tmp_path):
    class Gone:
        def __init__(self, number):
            self.number = number

        def write(self, text):
            raise OSError(self.number, "gone")

        def fileno(self):
            return file.fileno()
    with open(tmp_path / "x", "w") as file:
        assert checks.Quiet(Gone(errno.EIO)).write("text") == 4
        with pytest.raises(OSError):  # a full disk is no closed terminal
            checks.Quiet(Gone(errno.ENOSPC)).write("text")


def test_threads_that_wait_otherwise_give_the_same_bytes(short, tree, tmp_path):
    out = tmp_path / "run"
    subprocess.run(command("train_federated.py", "--data", tree, *BASE, "--rounds", 1, "--out",
                           out), env=os.environ | {"GOMP_SPINCOUNT": "100000"}, check=True)
    assert same_run(short, out)


# As a command finds them at its start, in a process that was forked.
CLOSED = """
import os, runpy, sys
for name in sys.argv.pop(1).split():
    os.close({"stdout": 1, "stderr": 2}[name])
    setattr(sys, name, None)
    setattr(sys, f"__{name}__", None)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
ENCODED = """
import runpy, sys
encoding = sys.argv.pop(1)
sys.stdout.reconfigure(encoding=encoding, errors="strict")
sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("closed", ["stdout", "stderr", "stdout stderr", ">&- 2>&-"])
def test_a_closed_stream_does_not_end_the_work(tree, tmp_path, closed):
    out = tmp_path / "run"
    line = command("train_federated.py", "--data", tree, *BASE, "--rounds", 1, "--out", out)
    if "&" in closed:
        done = subprocess.run(f"{' '.join(line)} {closed}", shell=True, capture_output=True,
                              text=True, check=False)
    else:
        done = Process(CLOSED, [closed, *line[2:]]).wait()
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (out / "results.json").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_any_encoding_of_the_terminal_will_do(tree, tmp_path, encoding):
    out = tmp_path / "run"
    lines = (command("data.py", "--help"), command("compare.py", "--help"),
             command("train_federated.py", "--data", tree, *BASE, "--rounds", 1, "--out", out),
             command("compare.py", out, "--out", tmp_path / "table"))
    for _, _, *line in lines:
        done = Process(ENCODED, [encoding, *line]).wait()
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert done.stdout
    shutil.rmtree(out)
    done = subprocess.run([sys.executable, ROOT / "compare.py", "--help"], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": encoding}, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and done.stdout, done.stderr
