"""Whatever the user gets wrong: one clear line on stderr, exit code 2, nothing lost."""

import checks

import argparse
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BASE, ROOT, SMALL, Process, kill, same_run, train, write_tree
from PIL import Image

import models
import train_central
import train_federated


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data sets, weights and runs, good and bad, by name."""
    root = tmp_path_factory.mktemp("place")
    good = write_tree(root / "good", {"a": 15, "b": 15})
    (root / "empty").mkdir()
    write_tree(root / "one-class", {"a": 12})
    write_tree(root / "tiny", {"a": 4, "b": 4})
    write_tree(root / "rare", {"a": 30, "b": 1})
    write_tree(root / "hollow", {"a": 12, "b": 0})
    (root / "file.txt").write_text("x")
    shutil.copytree(good, root / "broken")
    (root / "broken" / "a" / "text.jpg").write_text("no picture")
    (root / "broken" / "b" / "zero.png").write_bytes(b"")
    whole = (good / "a" / "a-001.png").read_bytes()
    (root / "broken" / "b" / "cut.png").write_bytes(whole[:-30])
    shutil.copytree(good, root / "bomb")
    Image.new("1", (14000, 14000)).save(root / "bomb" / "a" / "bomb.png")
    (root / "groups.csv").write_text("path,group\na/a-001.png,1\n")
    (root / "groups-bad.csv").write_text("no comma here\n")
    torch.save({"conv1.weight": torch.zeros(2)}, root / "other.pt")
    state = models.build("toynet", 1000).state_dict()
    torch.save(state | {"conv1.weight": torch.zeros(3)}, root / "shape.pt")
    torch.save({"state": Path("x")}, root / "code.pt")
    (root / "cut.pt").write_bytes((root / "shape.pt").read_bytes()[:3000])
    train(good, root / "run", "--rounds", 1)
    train_central.main(["--data", str(good), *SMALL, "--folds", "2", "--epochs", "1", "--out",
                        str(root / "folds")])
    (root / "damaged").mkdir()
    (root / "damaged" / "run.json").write_text("{")
    for name, content in (("list", "[1]"), ("foreign", '{"script": "other.py"}')):
        (root / name).mkdir()
        (root / name / "run.json").write_text(content)
    (root / "of-sites").mkdir()
    text = (root / "run" / "run.json").read_text()
    (root / "of-sites" / "run.json").write_text(text.replace(
        '"site_data": null', '"site_data": ["A=a", "B=b"]'))
    shutil.copytree(root / "run", root / "cut-run")
    (root / "cut-run" / "last.pt").write_bytes((root / "run" / "last.pt").read_bytes()[:999])
    shutil.copytree(good, root / "changed")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(root / "changed" / "a" / "a-001.png")
    return root


GOOD = "--data good"
CASES = [
    # data
    ("--data absent", "absent: no such folder"), ("--data=", "--data: an empty name"),
    ("--data file.txt", "file.txt: no such folder"),
    ("--data empty", "no class folder"),
    ("--data good/a", "no class folder"),
    ("--data one-class", "one class only (a)"),
    ("--data hollow", "has no image in it"),
    ("--data tiny", "8 images are too few"),
    ("--data rare --split stratified", "too small for a stratified split"),
    ("--data rare --split blocked", "too few for a blocked split"),
    ("--data rare --split-seed 5", "the training part has none of it"),
    ("--data broken", "3 unreadable image(s)"),
    ("--data broken", "a/text.jpg"), ("--data broken", "b/zero.png"),
    ("--data broken", "b/cut.png"),
    ("--data bomb", "a/bomb.png (more than 89,478,485 pixels; the environment variable"),
    (GOOD + " --model shufflenet_v2_x0_5 --batch-size 1", "--batch-size 1"),
    (GOOD + " --model googlenet", "has auxiliary classifiers: not supported"),
    (GOOD + " --table groups.csv", "29 image(s) are not in it (--skip-unlisted goes on without)"),
    (GOOD + " --table groups-bad.csv", "no column path; its headings are no comma here"),
    (GOOD + " --table absent.csv", "absent.csv"),
    (GOOD + " --skip-unlisted", "--columns and --skip-unlisted belong to --table"),
    (GOOD + " --split given", "neither table nor folders have a column split"),
    # flags
    (GOOD + " --clients 99", "99 clients are more than the 24 training images"),
    (GOOD + " --clients 24", "a client owns one image only"),
    (GOOD + " --partition dirichlet --alpha 0.001 --clients 20", "without an empty one"),
    (GOOD + " --partition shards --classes-per-client 3", "do not fit 2 classes"),
    *[(f"{GOOD} {flag} {value}", f"argument {flag}") for flag, value in (
        ("--clients", "0"), ("--clients", "-1"), ("--rounds", "0"), ("--local-epochs", "x"),
        ("--batch-size", "0"), ("--batch-size", "2.5"), ("--image-size", "0"), ("--lr", "0"),
        ("--lr", "-1"), ("--lr", "nan"), ("--weight-decay", "-1"),
        ("--clip", "-1"), ("--label-smoothing", "1.5"), ("--expand", "0"), ("--mu", "-1"),
        ("--fraction", "0"), ("--fraction", "1.5"), ("--alpha", "0"), ("--alpha", "inf"),
        ("--timeout", "0"), ("--timeout", "1e20"),
        ("--augment", "odd"), ("--remove", "odd"), ("--seed", "-1"), ("--split-seed", "-1"),
        ("--plateau", "-1"),
        ("--early-stop", "-1"), ("--classes-per-client", "0"), ("--optimizer", "adagrad"),
        ("--split", "odd"), ("--partition", "odd"), ("--sampler", "odd"), ("--bn", "odd"),
        ("--amp", "fp8"), ("--class-weights", "odd"))],
    (GOOD + " --round 3", "unrecognized arguments"),
    (GOOD + " --model resnet49", "unknown model 'resnet49'"),
    (GOOD + " --model squeezenet1_1", "one linear layer"),
    (GOOD + " --train-from layer4", "no such module"),
    (GOOD + " --model resnet18 --train-from fc --bn recalibrate", "what --train-from freezes"),
    (GOOD + " --model vgg11 --bn local", "--bn local: vgg11 has no BatchNorm"),
    (GOOD + " --model vgg11 --image-size 8", "--image-size 8 does not suit VGG"),
    (GOOD + " --device cuda:7", "--device cuda:7: not there"),
    (GOOD + " --amp bf16 --image-size 16", "--amp bf16 needs images over 16 pixels"),
    # weights
    (GOOD + " --weights absent.pt", "absent.pt: no such file"),
    (GOOD + " --weights other.pt", "another architecture"),
    (GOOD + " --weights shape.pt", "wrong shape or type of conv1.weight"),
    (GOOD + " --weights cut.pt", "truncated"),
    (GOOD + " --weights code.pt", "refused"),
    (GOOD + " --model resnet18 --weights imagenet", "--weights PATH, or --weights none"),
    # runs
    (GOOD + " --out run", "--out run: exists already"),
    (GOOD + " --out empty", "--out empty: exists already"),
    (GOOD + " --out file.txt/run", "Not a directory"),
    ("--resume empty", "not a run folder"), ("--resume absent", "not a run folder"),
    ("--resume file.txt", "not a run folder"), ("--resume damaged", "damaged, not JSON"),
    ("--resume list", "not written by a run"), ("--resume foreign", "not written by a run"),
    ("--resume cut-run", "truncated"),
    ("--resume run --lr 0.5", "--lr is 0.01 there, not 0.5"),
    ("--resume run --mu 1 --rounds 9", "--rounds is 1 there, not 9"),
    ("--resume run --data changed", "the images are not those of the run"),
    ("--resume run --out new", "--out has no place"),
    (GOOD + " --site-data a=good", "--site-data and --classes need torchrun"),
    (GOOD + " --classes a b", "--site-data and --classes need torchrun"),
    ("--resume folds", "a run of train_central.py"),
]
CENTRAL = [
    (GOOD + " --folds 16", "16 folds are more than the 15 images of class number 0"),
    ("--data rare", "5 folds are more than the 1 images of class number 1"),
    (GOOD + " --split blocked", "too few for 5 blocked folds"),
    (GOOD + " --split stratified80", "stratified80 knows no folds"),
    (GOOD + " --like run --folds 2", "--like run: --folds is 1 there"),
    ("--like empty", "not a run folder"), ("--like absent", "not a run folder"),
    ("--like damaged", "damaged, not JSON"), ("--like folds", "not a federated one"),
    ("--like of-sites", "not a federated one whose images are all in one folder"),
    ("--like run --data changed", "the images are not those of the run"),
    ("--like run --split-seed 3", "do not give its split"),
    *[(f"{GOOD} {flag} {value}", f"argument {flag}") for flag, value in (
        ("--folds", "0"), ("--epochs", "0"), ("--inner-val", "0.6"), ("--inner-val", "-1"),
        ("--period", "0"), ("--bn", "local"))],
    (GOOD + " --clients 4", "unrecognized arguments"),
    (GOOD + " --local-only", "--local-only needs --like RUN"),
    ("--like run --local-only --folds 2", "--like run: --folds is 1 there"),
    (GOOD + " --model resnet49", "unknown model"), (GOOD + " --weights absent.pt", "no such file"),
    (GOOD + " --amp bf16 --image-size 16", "--amp bf16 needs images over 16 pixels"),
    (GOOD + " --device cuda:7", "not there"), (GOOD + " --out run", "exists already"),
    (GOOD + " --model shufflenet_v2_x0_5 --folds 2 --batch-size 1", "--batch-size 1"),
    ("--resume run", "a run of train_federated.py"), ("--resume empty", "not a run folder"),
    ("--resume folds/fold1", "part of a larger run, resume folds"),
    ("--resume folds --epochs 9", "--epochs is 1 there, not 9"),
]


ALL = [(train_federated, BASE, *c) for c in CASES] + [(train_central, SMALL, *c) for c in CENTRAL]


@pytest.mark.parametrize("script,base,line,words", ALL,
                         ids=[f"{c[0].__name__} {c[2]} : {c[3]}" for c in ALL])
def test_one_clear_line_and_exit_code_2(place, tmp_path, monkeypatch, capsys, script, base, line,
                                        words):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(place)
    before = sorted(p.name for p in place.iterdir())
    argv = line.split()
    if "--resume" not in argv and "--like" not in argv:
        argv = [*base, *argv]
    with pytest.raises(SystemExit) as stop:
        checks.guard(lambda: script.main(argv))
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(x for x in lines if not x.startswith("Downloading: "))  # torch 2.6's own note
    assert stop.value.code == 2
    assert error.count("\n") == 1 and "error: " in error and "Traceback" not in error
    assert words in error
    assert sorted(p.name for p in place.iterdir()) == before


@pytest.mark.parametrize(("kind", "text", "words"), [
    (checks.number(0), "x", "'x' is not a number"),
    (checks.integer(1), "2.5", "'2.5' is not a whole number"),
    (checks.integer(1), "0", "0 is outside [1, 4294967295]"),
    (checks.number(0), "-0.1", "-0.1 is outside [0, ∞)"),
    (checks.number(0), "inf", "inf is outside [0, ∞)"),
    (checks.number(0, open_low=True), "0", "0 is outside (0, ∞)"),
    (checks.number(0, 0.5), "0.51", "0.51 is outside [0, 0.5]"),
    (checks.number(0, 0.5), "nan", "nan is outside [0, 0.5]")])
def test_a_number_outside_of_its_interval_is_refused_and_its_ends_are_not(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert str(error.value) == words
    ends = checks.number(0)("0"), checks.number(0, 0.5)("0.5"), checks.integer(1)("1")
    assert ends == (0, 0.5, 1) and checks.number(0, 1, open_low=True)("1e-9") == 1e-9


def test_changed_images_are_noticed_on_resume(place, tmp_path):
    shutil.copytree(place / "good", tmp_path / "set")
    out = train(tmp_path / "set", tmp_path / "run", "--rounds", 1)
    shutil.copy(place / "changed" / "a" / "a-001.png", tmp_path / "set" / "a" / "a-001.png")
    with pytest.raises(checks.InputError, match="not those of the run"):
        train_federated.main(["--resume", str(out)])


ORDINARY = """
import os, sys
import torch._dynamo, torch.utils._pytree
from PIL import Image
import checks, train_federated
Image.init()
if os.geteuid() == 0:  # root could read and write everything
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
sys.argv[0] = 'train_federated.py'
checks.guard(lambda: train_federated.main(sys.argv[1:]))
"""


def refused(*arguments):
    """What an ordinary user is told, in one line."""
    done = Process(ORDINARY, arguments, cwd="/").wait()
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_folders_that_may_not_be_read_or_written(open_place):
    tree, out, closed = open_place / "set", open_place / "run", open_place / "closed"
    write_tree(tree, {"a": 15, "b": 15})
    kill("train_step", 6, "train_federated", "--data", tree, *BASE, "--out", out)
    kept = {p.name: p.read_bytes() for p in out.iterdir()}
    assert models.read_file(out / "last.pt")["round"] == 1
    closed.mkdir(mode=0o555)
    assert "Permission denied" in refused("--data", tree, *BASE, "--out", closed / "run")
    out.chmod(0o555)
    assert "Permission denied" in refused("--resume", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == kept
    out.chmod(0o755)
    train_federated.main(["--resume", str(out)])
    assert same_run(out, train(tree, open_place / "whole"))
    for path, words in ((tree / "a" / "a-001.png", "1 unreadable image(s)"),
                        (tree / "a", "Permission denied"), (tree, "Permission denied")):
        path.chmod(0)
        error = refused("--data", tree, *BASE, "--out", open_place / "none")
        path.chmod(0o755)
        assert words in error and str(path.name) in error
    assert not (open_place / "none").exists() and not list(closed.iterdir())


def test_skip_bad_goes_on_and_records(place, tmp_path, capsys):
    out = train(place / "broken", tmp_path / "run", "--rounds", 1, "--skip-bad")
    assert "3 unreadable image(s) left out: a/text.jpg, b/cut.png, b/zero.png" in \
        capsys.readouterr().err
    assert '"a/text.jpg"' in (out / "run.json").read_text()
    clean = train(place / "good", tmp_path / "clean", "--rounds", 1)
    assert (clean / "predictions.csv").read_bytes() == (out / "predictions.csv").read_bytes()


def test_disk_full_keeps_the_last_good_checkpoint(place, tmp_path):
    """A process under a file size limit that the first file fits and a later one does not."""
    out = train(place / "good", tmp_path / "whole", "--rounds", 2)
    part = tmp_path / "part"
    limit = (out / "last.pt").stat().st_size - 100  # history makes the last one the largest
    program = ("import resource, runpy\n"
               f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
               f"runpy.run_path({str(ROOT / 'train_federated.py')!r}, run_name='__main__')\n")
    done = Process(program, ["--data", place / "good", *BASE, "--rounds", "2", "--out",
                             part]).wait()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert models.read_file(part / "last.pt")["round"] < 2 and not list(part.glob("*.tmp"))
    train_federated.main(["--resume", str(part)])
    assert same_run(out, part)


def test_the_script_as_a_command_says_the_same(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train_federated.py", "--data", "nowhere"],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "train_federated.py: error: --data nowhere: no such folder\n"


def test_help_names_every_group(capsys):
    with pytest.raises(SystemExit) as stop:
        train_federated.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for group in ("data", "split", "clients", "model", "federation", "local training",
                  "run folder", "machine"):
        assert f"\n{group}:" in out
