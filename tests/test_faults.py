"""Faults of part H found by trying: each of a kind, with exact outcomes."""

import checks
from checks import InputError

import errno
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers import BASE, SMALL, train, write_tree
from PIL import Image

import audit
import compare
import data
import explain
import models
import train_central
import train_federated
from auditing import probes
from dataset import splits
from explaining import faithfulness
from reporting import architecture, report, run_folder

QUICK = ["--samples", "20", "--steps", "2", "--lime-seeds", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small set and a run on it; a test that writes in it removes what it wrote."""
    root = tmp_path_factory.mktemp("faults")
    tree = write_tree(root / "set", {"a": 15, "b": 15}, size=32)
    return train(tree, root / "run", "--rounds", 1, "--image-size", 32), tree


def ended(capsys, main):
    """(exit code, lines on stderr) of a script that ends early."""
    with pytest.raises(SystemExit) as stop:
        checks.guard(main)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


def interrupts(*args, **more):
    raise KeyboardInterrupt


def full(*args, **more):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- networks and sizes -------------------------------------------------------------------------

@pytest.mark.parametrize("name,words", [
    ("googlenet", "auxiliary classifiers"), ("inception_v3", "auxiliary classifiers"),
    ("squeezenet1_1", "one linear layer"), ("vit_b_16", "Expected 224 but got 20")])
def test_what_does_not_fit_is_refused_before_any_image_is_read(tree, monkeypatch, name, words):
    monkeypatch.setattr(data, "read_folder", lambda *a: pytest.fail("images were read"))
    with warnings.catch_warnings(), pytest.raises(InputError, match=words):
        warnings.simplefilter("error")  # one line, none of torchvision's beside it
        train_federated.main(["--data", str(tree), *BASE, "--model", name])


def test_the_size_is_checked_without_memory_and_without_touching_the_network():
    model = models.build("resnet18", 2)
    models.check_size(model, 100_000)
    assert model.fc.weight.device.type == "cpu" and model.training
    with pytest.raises(InputError, match="--batch-size 1 does not suit BatchNorm"):
        models.check_size(model, 32, 1)
    models.freeze(model, batchnorm=True)
    models.check_size(model, 32, 1)  # frozen BatchNorm needs no batch
    rows = architecture.table(model, 100_000)
    assert ("layer4", "(512, 3125, 3125)") in [row[:2] for row in rows]


def test_too_large_images_say_what_memory_they_need(tree, monkeypatch):
    monkeypatch.setattr(data, "decode_all", lambda *a: pytest.fail("images were decoded"))
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"72 images x 3 x 10000000² bytes are 20,116,568 GiB.* has {has / 2**30:,.0f} "
    for size in (10_000_000, 2**32 - 1):
        with pytest.raises(InputError, match=words if size == 10_000_000 else "this machine has"):
            data.read_folder(str(tree), size)
    data.check_memory(1, int((has / 3) ** 0.5))
    with pytest.raises(InputError, match="320 images"):
        train_federated.main(["--image-size", "10000000"])


def test_images_that_fill_the_memory_exactly_are_taken(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**30, "SC_PHYS_PAGES": 3}.get)
    data.check_memory(4, 2**14)  # 4 images x 3 bytes x 2^28 pixels: 3 GiB
    with pytest.raises(InputError, match="5 images .* are 4 GiB of memory.* machine has 3 "):
        data.check_memory(5, 2**14)


@pytest.mark.parametrize("error,words", [
    (MemoryError("Unable to allocate 8 GiB"), "not enough memory (Unable to allocate 8 GiB); a"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory (Default"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "not enough memory (Def"),
    (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory (CUDA out of memory.)")])
def test_any_lack_of_memory_is_one_line(capsys, error, words):
    def main():
        raise error
    code, lines = ended(capsys, main)
    assert code == 2 and len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize("words", ["shapes differ", "CUDA error: an illegal memory access"])
def test_other_errors_of_pytorch_are_not_hidden(words):
    def main():
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match=words):
        checks.guard(main)


@pytest.mark.parametrize("text", ["4294967296", "1" + "0" * 400])
def test_whole_numbers_that_no_generator_takes_are_refused(capsys, text):
    assert checks.integer(0)("4294967295") == 2**32 - 1
    code, lines = ended(capsys, lambda: train_federated.main(["--seed", text]))
    assert code == 2 and len(lines) == 1 and lines[0].endswith("outside [0, 4294967295]")


# ---- Ctrl-C and full disks ----------------------------------------------------------------------

def test_ctrl_c_before_the_first_file_leaves_no_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "write_run", interrupts)
    argv = ["--data", str(run[1]), *BASE, "--out", str(tmp_path / "run")]
    code, lines = ended(capsys, lambda: train_federated.main(argv))
    assert code == 130 and not (tmp_path / "run").exists()
    assert lines == ["stopped; nothing was kept, go on with the same command"]


def test_a_full_disk_says_how_to_go_on(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(run_folder, "append_history", full)
    argv = ["--data", str(run[1]), *BASE, "--rounds", "1", "--out", str(out)]
    code, lines = ended(capsys, lambda: train_federated.main(argv))
    assert code == 2 and len(lines) == 1
    assert lines[0].endswith("No space left on device; go on with: python train_federated.py "
                             f"--resume {out}")


def calls(run, out):
    """Every script that makes a folder of results, with that folder."""
    picture = str(min((run[1] / "a").iterdir()))
    return {"explain": (lambda: explain.main([str(run[0]), "--images", picture, *QUICK]),
                        run[0] / "explanations"),
            "audit run": (lambda: audit.main(["run", str(run[0])]), run[0] / "audit"),
            "audit data": (lambda: audit.main([
                "data", str(run[1]), "--image-size", "32", "--split-seeds", "2", "--out",
                str(out)]), out),
            "compare": (lambda: compare.main([str(run[0]), "--out", str(out)]), out)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(explain, "STAGES", (1.0,))


NAMES = ["explain", "audit run", "audit data", "compare"]


@pytest.mark.parametrize("failure,code", [(interrupts, 130), (full, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_short_leaves_nothing(run, quick, tmp_path, monkeypatch, capsys, name, failure,
                                          code):
    main, folder = calls(run, tmp_path / "out")[name]
    monkeypatch.setattr(run_folder, "write_json", failure)
    found, lines = ended(capsys, main)
    assert found == code and not folder.exists() and len(lines) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_figure_is_one_warning(run, quick, tmp_path, monkeypatch, capsys, name):
    main, folder = calls(run, tmp_path / "out")[name]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    main()
    printed = capsys.readouterr()
    warned = [line for line in printed.err.splitlines() if "WARNING" in line]
    assert len(warned) == 1 and "the report is not complete (OSError: [Errno 28]" in warned[0]
    assert warned[0].endswith(".json") and list(folder.glob("*.json"))
    assert not list(folder.glob("*.png")) and not list(folder.glob("*.tmp"))
    assert "report: " not in printed.out
    shutil.rmtree(folder)


def test_results_of_folds_are_there_before_the_report_and_a_report_is_made_up_for(
        run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "folds"
    monkeypatch.setattr(report, "draw_run", full)
    monkeypatch.setattr(report, "draw_pooled", full)
    train_central.main(["--data", str(run[1]), *SMALL, "--folds", "2", "--epochs", "1", "--out",
                        str(out)])
    assert capsys.readouterr().err.count("WARNING") == 3  # of each fold, and of the whole
    before = (out / "results.json").read_bytes()
    assert not list(out.rglob("report.md"))
    monkeypatch.undo()
    monkeypatch.setattr("reporting.figures.save", lambda *a: None)
    train_central.main(["--resume", str(out)])
    assert len(list(out.rglob("report.md"))) == 3 and (out / "results.json").read_bytes() == before


def test_results_of_sites_are_there_before_the_report(run, tmp_path, monkeypatch, capsys):
    own = json.loads((run[0] / "results.json").read_text())
    told = {which: {part: [[own[which][part][key] for key in ("confusion", "n", "loss")]]
                    for part in ("val", "test")} for which in ("last", "best")}
    results = {"data": "N", "sites": ["N"], "last": {"round": 1}, "best": {"round": 1}}
    monkeypatch.setattr(report, "read_run", full)
    report.write_sites(tmp_path, results, told, [],
                       list(own["best"]["test"]["per_class"]))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["best"]["test"]["accuracy"] == own["best"]["test"]["accuracy"]
    assert capsys.readouterr().err.count("WARNING") == 1


def test_a_contact_sheet_never_lies_on_a_picture(run, monkeypatch, capsys, tmp_path):
    picture = min((run[1] / "a").iterdir())
    before = picture.read_bytes()
    monkeypatch.setattr("sys.argv", ["data.py", "--data", str(run[1]), "--sheet", str(picture)])
    assert ended(capsys, data.main) == (2, [f"data.py: error: --sheet {picture}: exists already"])
    assert picture.read_bytes() == before
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr("sys.argv", ["data.py", "--data", str(run[1]), "--image-size", "32",
                                     "--sheet", str(tmp_path / "x.png")])
    assert ended(capsys, data.main)[0] == 2 and not list(tmp_path.iterdir())


# ---- damaged runs and odd sets ------------------------------------------------------------------

@pytest.mark.parametrize("content", ["", "path,label,split,client\n", "path,label\na/a-001.png,a\n",
                                     "a,b\n1,2\n"])
def test_a_damaged_split_is_one_line(run, tmp_path, content):
    images = data.read_folder(str(run[1]), 32)
    (tmp_path / "split.csv").write_text(content)
    with pytest.raises(InputError, match="split.csv: damaged"):
        run_folder.read_split(tmp_path, images)


def test_results_of_another_program_are_one_line(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="not written by a run of this project"):
        run_folder.read_json(tmp_path / "results.json")


def test_an_audit_of_a_run_without_one_network_says_so(run, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "run")
    facts = json.loads((out / "run.json").read_text())
    facts["arguments"]["bn"] = "local"
    (out / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="every client has its own BatchNorm; one network is"):
        audit.main(["run", str(out)])


def test_an_audit_refuses_a_folder_that_is_there_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read_folder", lambda *a, **k: pytest.fail("images were read"))
    with pytest.raises(InputError, match="exists already"):
        audit.main(["data", str(run[1]), "--out", str(tmp_path)])


def test_a_probe_of_one_class_predicts_it():
    x, labels = np.arange(6.0)[:, None], np.array([1, 1, 1, 0, 1, 0])
    found = probes.fit_predict(x, labels, np.arange(3), np.arange(3, 6))
    assert found.tolist() == [1, 1, 1]


def test_a_comparison_draws_no_figure_that_is_undefined(tmp_path):
    nothing = {"value": None, "low": None, "high": None}
    compare.plot({"net": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}, "more":
                  {"accuracy": nothing}, "no network: means": {"accuracy": nothing}, "no network: "
                  "statistics": {"accuracy": {"mean": None, "n": 0}}}, {}, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").format == "PNG"


# ---- two holes ----------------------------------------------------------------------------------

def test_mean_interval_of_exactly_two_values_and_of_one():
    """Student's t with one degree of freedom is Cauchy's: its 97.5 % quantile is tan(0.475 π)."""
    half = np.tan(0.475 * np.pi) * np.sqrt(2) / np.sqrt(2)  # sd of 1 and 3 over the root of n
    found = faithfulness.mean_interval([1.0, None, 3.0])
    assert found["n"] == 2 and found["value"] == 2.0
    assert found["low"] == pytest.approx(2 - half) and found["high"] == pytest.approx(2 + half)
    assert faithfulness.mean_interval([1.0]) == {"n": 1, "value": 1.0, "low": None, "high": None}
    assert faithfulness.mean_interval([None]) == {"n": 0, "value": None, "low": None, "high": None}


def test_the_smallest_class_of_a_blocked_split():
    """75 files: 1 trains, 30 are dropped, 7 validate, 30 are dropped, 7 test. 74 leave none."""
    def split(n):
        return splits.make_split("blocked", np.zeros(n, int), 0,
                                 paths=[f"{i:03d}.png" for i in range(n)])
    assert {name: part.tolist() for name, part in split(75).items()} == {
        "train": [0], "val": list(range(31, 38)), "test": list(range(68, 75))}
    with pytest.raises(InputError, match="has 74 images, too few for a blocked split"):
        split(74)
