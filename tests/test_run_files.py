"""What stands in the files of a run folder, and what each function reads out of them again."""

from checks import InputError

import argparse
import errno
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, toy_images

from reporting import finished, provenance, run_folder

SPLIT = {"train": np.array([0, 1]), "val": np.array([2, 3]), "test": np.array([3, 4, 5])}


def seven():
    """Seven images of classes c0, c1, c2, c0, ...: two train, one is in no part."""
    return toy_images(7, classes=3)


def arguments(**changes):
    return argparse.Namespace(**{
        "data": None, "table": None, "columns": None, "skip_unlisted": False, "seed": 3,
        "out": None, "resume": None, "cache": None, "timeout": 9, "argv": ["--seed", "3"],
        "model": "toynet", "remove": []} | changes)


# ---- predictions --------------------------------------------------------------------------------

def test_probabilities_are_written_with_nine_digits_and_an_image_of_two_parts_once(tmp_path):
    never = -np.inf
    logits = {"val": [[0, 0, never], [never, 0, never]],
              "test": [[9, 9, 9], [0, 0, 0], [never, never, 5]]}
    finished.write_predictions(tmp_path, seven(), SPLIT, {
        part: np.array(rows, np.float32) for part, rows in logits.items()})
    assert (tmp_path / "predictions.csv").read_text().splitlines() == [
        "path,label,split,prediction,p_c0,p_c1,p_c2",
        "c2/002.png,c2,val,c0,0.5,0.5,0", "c0/003.png,c0,val+test,c1,0,1,0",
        "c1/004.png,c1,test,c0,0.333333343,0.333333343,0.333333343",  # a third as float32
        "c2/005.png,c2,test,c2,0,0,1"]
    (tmp_path / "all").mkdir()
    (tmp_path / "predictions.csv").rename(tmp_path / "all" / "predictions.csv")
    with pytest.raises(InputError, match=r"has no predictions.csv; name one of its parts: all$"):
        finished.read_predictions(tmp_path)  # of hospitals with images of their own
    (tmp_path / "all" / "predictions.csv").rename(tmp_path / "predictions.csv")
    with pytest.raises(InputError, match="is the run complete"):
        finished.read_predictions(tmp_path / "all")
    test, val = (finished.read_predictions(tmp_path, *part) for part in ([], ["val"]))
    assert test.paths == ["c0/003.png", "c1/004.png", "c2/005.png"]
    assert val.paths == ["c0/003.png", "c2/002.png"] and val.labels.tolist() == [0, 2]
    assert test.labels.tolist() == [0, 1, 2] and test.classes == ["c0", "c1", "c2"]
    assert test.logits == pytest.approx(np.log([[1e-45, 1, 1e-45], [0.333333343] * 3,
                                                [1e-45, 1e-45, 1]]))  # never infinite


def test_the_folds_of_a_run_are_its_test_images_and_it_has_no_others(tmp_path):
    with pytest.raises(InputError, match="has no predictions.csv; is the run complete"):
        finished.read_predictions(tmp_path)
    file = tmp_path / "predictions.csv"
    header = "path,label,split,prediction,p_a,p_b\n"
    file.write_text(header + "z,b,fold2,a,1,0\ny,a,fold1,a,1,0\nx,a,train,a,1,0\n")
    found = finished.read_predictions(tmp_path)
    assert found.paths == ["y", "z"] and found.labels.tolist() == [0, 1]
    with pytest.raises(InputError, match="no val image in it"):
        finished.read_predictions(tmp_path, "val")
    for damage in ("y,a\n", "y,c,test,a,1,0\n", "y,a,test,a,1\n", "y,a,test,a,1,x\n"):
        file.write_text(header + damage)
        with pytest.raises(InputError, match="damaged"):
            finished.read_predictions(tmp_path)


# ---- the split ----------------------------------------------------------------------------------

def test_a_split_is_written_and_read_back(tmp_path):
    images, clients = seven(), [np.array([1]), np.array([0])]
    run_folder.write_split(tmp_path, images, SPLIT, clients)
    assert (tmp_path / "split.csv").read_text().splitlines() == [
        "path,label,split,client", "c0/000.png,c0,train,1", "c1/001.png,c1,train,0",
        "c2/002.png,c2,val,", "c0/003.png,c0,val+test,", "c1/004.png,c1,test,",
        "c2/005.png,c2,test,", "c0/006.png,c0,dropped,"]
    split, owners, names = run_folder.read_split(tmp_path, images)
    assert {p: i.tolist() for p, i in split.items()} == {p: i.tolist() for p, i in SPLIT.items()}
    assert [own.tolist() for own in owners] == [[1], [0]] and names == ["0", "1"]
    assert finished.read_units(tmp_path, images.paths) is None
    # what a table said of clients, and of images that do not train, stands there as well
    images.known = {"client": np.array(["N", "9", "9", "", "N", "", ""]),
                    "group": np.array(list("1122334")), "patient": np.array(list("abcdefg"))}
    run_folder.write_split(tmp_path, images, SPLIT, clients)
    assert (tmp_path / "split.csv").read_text().splitlines()[:4] == [
        "path,label,split,client,patient,group", "c0/000.png,c0,train,N,a,1",
        "c1/001.png,c1,train,9,b,1", "c2/002.png,c2,val,9,c,2"]
    split, owners, names = run_folder.read_split(tmp_path, images)
    assert [own.tolist() for own in owners] == [[1], [0]] and names == ["9", "N"]
    some = images.paths[4:1:-1]
    unit, values = finished.read_units(tmp_path, some)
    assert unit == "patient" and values.tolist() == ["e", "d", "c"]
    del images.known["patient"]
    run_folder.write_split(tmp_path, images, SPLIT, clients)
    unit, values = finished.read_units(tmp_path, some)
    assert unit == "group" and values.tolist() == ["3", "2", "2"]
    assert finished.read_units(tmp_path, [*some, "another.png"]) is None
    assert finished.read_units(tmp_path / "none", some) is None


def test_a_run_goes_on_only_with_its_own_split_and_its_own_clients(tmp_path):
    images, clients = seven(), [np.array([0]), np.array([1])]
    start = {"state": {"w": torch.zeros(2)}, "round": 0, "history": []}
    assert run_folder.start_or_resume(tmp_path, images, SPLIT, clients, start) is start
    assert (tmp_path / "history.jsonl").read_text() == ""
    run_folder.save(start | {"history": [{"round": 1}], "round": 1}, tmp_path / "last.pt")
    for number in (1, 2):  # the second was written, its checkpoint was not
        run_folder.append_history(tmp_path, {"round": number})
    found = run_folder.start_or_resume(tmp_path, images, SPLIT, clients, start)
    assert found["round"] == 1 and finished.read_history(tmp_path) == [{"round": 1}]
    assert [run_folder.unit_of(r) for r in (found, {"epoch": 1})] == ["round", "epoch"]
    for split, owners in ((SPLIT | {"val": np.array([2])}, clients), (SPLIT, clients[::-1])):
        with pytest.raises(InputError, match="the flags and the table here do not give its split"):
            run_folder.start_or_resume(tmp_path, images, split, owners, start)


def test_a_finished_run_without_its_checkpoint_is_not_trained_anew(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="finished, and its last.pt is gone"):
        run_folder.start_or_resume(tmp_path, seven(), SPLIT, [np.array([0])], {})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


# ---- run.json -----------------------------------------------------------------------------------

def test_json_files_hold_no_number_that_is_none(tmp_path):
    run_folder.write_json(tmp_path / "a.json", {"a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1.5,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_folder.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None]}


def test_run_json_says_what_made_the_run_and_not_where(tmp_path, monkeypatch):
    images = seven()
    images.bad, images.ignored[".txt"] = [("c0/x.png", "cut")], 2
    monkeypatch.chdir(tmp_path)
    run_folder.write_run(tmp_path, arguments(data="set", table="t.csv"), "central", images, CPU,
                         "folds")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["arguments"] == {"data": str(tmp_path / "set"), "table": str(tmp_path / "t.csv"),
                                "columns": None, "skip_unlisted": False, "seed": 3,
                                "model": "toynet", "remove": []}
    told = {k: run[k] for k in run if k not in ("arguments", "machine", "git", "fingerprint")}
    assert told == {
        "script": "train_central.py", "part_of": "folds", "argv": ["--seed", "3"], "seed": 3,
        "synthetic": False, "data": "toy", "classes": ["c0", "c1", "c2"], "images": 7,
        "bad_files": [["c0/x.png", "cut"]], "ignored_files": "2 .txt", "launcher": None}
    run_folder.write_run(tmp_path, arguments(), "central", seven(), CPU)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["synthetic"] and run["part_of"] is None and run["arguments"]["data"] is None
    assert run["ignored_files"] == {}


def test_another_machine_is_a_note_and_the_same_is_none(tmp_path, capsys):
    run_folder.write_run(tmp_path, arguments(), "federated", seven(), CPU)
    again = arguments(resume=str(tmp_path))
    assert run_folder.begin(again, "federated", seven(), CPU) == tmp_path
    assert capsys.readouterr().err == ""
    run = json.loads((tmp_path / "run.json").read_text())
    run["machine"] |= {"python": "2.7"}
    run_folder.write_json(tmp_path / "run.json", run)
    run_folder.begin(again, "federated", seven(), CPU)
    assert capsys.readouterr().err == (f"note: python was 2.7 and is {platform.python_version()}: "
                                       "results may differ from an uninterrupted run\n")
    with pytest.raises(InputError, match="the images are not those of the run"):
        run_folder.begin(again, "federated", toy_images(8), CPU)


def test_a_new_run_is_named_by_script_model_data_and_seed_and_numbered_from_two(tmp_path,
                                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("", "-2", "-3"):
        folder = run_folder.begin(arguments(), "central", seven(), CPU)
        assert folder == Path("runs", f"central-toynet-toy-seed3{number}")
        assert (folder / "run.json").exists()
    assert run_folder.begin(arguments(out="a/b"), "central", seven(), CPU) == Path("a/b")
    with pytest.raises(InputError, match="a/b: exists already"):
        run_folder.begin(arguments(out="a/b"), "central", seven(), CPU)
    assert (Path("a/b") / "run.json").exists()


def test_images_are_read_again_by_what_split_csv_says_where_a_table_was_used(tmp_path):
    here, there = (str(tmp_path / name) for name in "ab")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for table in (None, "t.csv"):
        (tmp_path / "run.json").write_text(json.dumps({"arguments": {
            "data": here, "table": table, "columns": ["path=p"], "skip_unlisted": False,
            "remove": []}}))
        for place, cache in ((None, None), (there, "/c")):
            (tmp_path / "split.csv").unlink(missing_ok=True)
            args = finished.read_arguments(tmp_path, place, cache)
            assert (args.data, args.cache) == (place or here, cache)
            assert (args.table, args.columns, args.skip_unlisted) == (table, ["path=p"], False)
            (tmp_path / "split.csv").touch()
            args = finished.read_arguments(tmp_path, place, cache)
            assert (args.table, args.columns, args.skip_unlisted) == (
                (str(tmp_path / "split.csv"), None, True) if table else (None, ["path=p"], False))
    (tmp_path / "a").rmdir()
    with pytest.raises(InputError, match="no such folder .images that were moved: --data DIR"):
        finished.read_arguments(tmp_path, None, None)


# ---- ends and starts ----------------------------------------------------------------------------

@pytest.mark.parametrize(("error", "code", "words"), [
    (KeyboardInterrupt(), 130, "\nstopped; go on with: python train_central.py --resume {}\n"),
    (FloatingPointError("loss is nan"), 1, "loss is nan; the last good state is kept in {}\n"),
    (OSError(errno.ENOSPC, "No space left"), None, "")])
@pytest.mark.parametrize("known", [True, False])
def test_what_ends_a_run_says_how_to_go_on_where_there_is_a_folder(tmp_path, capsys, error, code,
                                                                   words, known):
    run_folder.write_run(tmp_path, arguments(), "central", seven(), CPU)
    with (pytest.raises(InputError if code is None else SystemExit) as stop,
          run_folder.resumable(tmp_path if known else None)):
        raise error
    assert capsys.readouterr().err == (words.format(tmp_path) if known else "")
    if code is None:
        hint = f"; go on with: python train_central.py --resume {tmp_path}"
        assert str(stop.value) == "[Errno 28] No space left" + (hint if known else "")
    else:
        assert stop.value.code == code


@pytest.fixture
def restarted(tmp_path, monkeypatch):
    """A process that torchrun has started again, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    def begun(folder, launcher, age=0):
        Path(folder).mkdir(parents=True)
        run = {"arguments": {}, "launcher": launcher}
        (Path(folder) / "run.json").write_text(json.dumps(run))
        os.utime(folder, (10**9 - age, 10**9 - age))
        return folder
    return begun


def test_a_process_that_torchrun_starts_again_resumes_its_own_newest_run(restarted, monkeypatch):
    mine = f"{platform.node()} {os.getppid()} job7"
    assert provenance.launcher() == mine and provenance.restarts() == 1
    assert run_folder.continued(["--lr", "1"]) == ["--lr", "1"]  # nothing was begun
    for name, launcher, age in (("a", mine, 5), ("b", mine, 2), ("c", mine, 9), ("d", "x", 0)):
        restarted(f"runs/{name}", launcher, age)
    assert run_folder.continued(["--lr", "1", "--help"]) == [
        "--lr", "1", "--help", "--resume", "runs/b"]
    assert run_folder.continued(["--timeout", "7", "--cache", "c"]) == [  # as the others have it
        "--timeout", "7", "--cache", "c", "--resume", "runs/b"]
    assert run_folder.continued(["--resume", "runs/a"]) == ["--resume", "runs/a"]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert provenance.restarts() == 0 and run_folder.continued(["--lr", "1"]) == ["--lr", "1"]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert provenance.launcher() is None


def test_a_named_folder_is_resumed_where_it_is_its_own_and_made_anew_where_it_is_empty(restarted):
    restarted("runs/newer", provenance.launcher())
    argv = ["--out", restarted("mine", provenance.launcher())]
    assert run_folder.continued(argv) == ["--resume", "mine"]
    argv = ["--out", restarted("other", "another launcher")]
    assert run_folder.continued(argv) == argv and Path("other").is_dir()
    Path("empty").mkdir()
    assert run_folder.continued(["--out", "empty"]) == ["--out", "empty"]
    assert not Path("empty").exists()


def test_the_commit_is_told_with_its_changes_and_none_outside_git(monkeypatch):
    said = {"rev-parse": "abc\n", "status": ""}

    def git(command, check=False, capture_output=False, text=False):
        word = next(w for w in command if w in ("rev-parse", "status"))
        if said[word] is None and check:
            raise subprocess.CalledProcessError(128, command)
        output = (said[word] or "") if capture_output else None
        return subprocess.CompletedProcess(command, 0, output if text else output.encode())
    monkeypatch.setattr(subprocess, "run", git)
    assert provenance.git_commit() == "abc"
    said["status"] = " M fedavg.py\n"
    assert provenance.git_commit() == "abc+changes"
    said["rev-parse"] = None
    assert provenance.git_commit() is None
