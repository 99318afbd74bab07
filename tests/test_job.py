"""One process of a job by itself, with no second one: what it refuses, says, counts, ends with."""

import checks
from checks import InputError

import argparse
import io
import signal
import sys

import numpy as np
import pytest
import torch

from dataset.files import CLASSES
from fedavg import Update
from reporting import run_folder
from training import processes
from training.processes import Job, LostProcess


def process(rank=0, world=2, sites=()):
    job = Job()
    job.rank, job.local_rank, job.world, job.sites = rank, rank, world, list(sites)
    return job


def test_without_torchrun_a_job_is_its_first_and_only_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    job = Job()
    assert (job.rank, job.world, job.local_rank) == (0, 1, 0)
    assert job.mine([0, 3]) == [0, 3] and job.exchange("agreement", {"a": [1]}) == [{"a": [1]}]
    assert not job.claim()  # nothing was joined


# ---- meeting ------------------------------------------------------------------------------------

def test_processes_that_do_not_meet_are_one_line(monkeypatch):
    def away(*arguments, **more):
        raise RuntimeError("nobody is there\nat this address")
    monkeypatch.setattr(processes.dist, "rendezvous", away)
    args = argparse.Namespace(site_data=None, classes=None, timeout=3.0)
    for rank in (0, 1):
        with pytest.raises(InputError, match=r"the processes did not meet \(nobody is there\)$"):
            process(rank).join(args)


def test_an_output_folder_that_is_there_is_refused_by_the_first_process_alone(tmp_path,
                                                                              monkeypatch):
    def parsed(out):
        return run_folder.parse("", [], lambda args: {}, ["--out", str(out)]).out
    for rank in ("0", None):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK")
        with pytest.raises(InputError, match="exists already"):
            parsed(tmp_path)
        assert parsed(tmp_path / "new") == str(tmp_path / "new")
    monkeypatch.setenv("RANK", "1")  # which is told by the first
    assert parsed(tmp_path) == str(tmp_path)


def meet(monkeypatch, rank, names):
    """A process that has met the others, whose names are these; what it told the group."""
    job, told = process(rank, len(names)), {}
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(checks, "quiet", None)
    monkeypatch.setattr(processes.dist, "rendezvous", lambda url, timeout: iter([(
        "store", rank, len(names))]))
    monkeypatch.setattr(processes.dist, "PrefixStore", lambda prefix, store: (prefix, store))
    monkeypatch.setattr(processes.dist, "init_process_group", lambda kind, **more: told.update(
        more))
    monkeypatch.setattr(job, "exchange", lambda kind, value: names)
    monkeypatch.setattr(job, "_take_site", lambda args: names[rank])
    job.join(argparse.Namespace(site_data=any(names), classes=None, out=None, timeout=90.0))
    return job, told


@pytest.mark.parametrize(("rank", "names", "quiet"), [
    (0, [None, None], False), (1, [None, None], True), (0, ["A", "B"], False),
    (1, ["A", "B"], False)])
def test_the_first_process_warns_for_all_and_every_hospital_for_itself(monkeypatch, rank, names,
                                                                       quiet):
    job, told = meet(monkeypatch, rank, names)
    assert checks.quiet is quiet and job.sites == (names if names[0] else [])
    assert (told["rank"], told["world_size"]) == (rank, 2)
    assert told["timeout"].total_seconds() == 90


@pytest.mark.parametrize("names", [["A", "A"], [None, "B"], ["A", "B", "A"]])
def test_hospitals_without_a_name_of_their_own_do_not_begin(monkeypatch, names):
    with pytest.raises(InputError, match="every process needs a name of its own, not"):
        meet(monkeypatch, 0, names)
    with pytest.raises(SystemExit) as stop:
        meet(monkeypatch, 1, names)
    assert stop.value.code == 2


def site_flags(**changed):
    return argparse.Namespace(**{
        "site_data": ["A=x", "B=y"], "out": "run", "resume": None, "folds": 1, "table": None,
        "bn": "average", "classes": None, "data": None, "clients": None,
        "partition": None} | changed)


@pytest.mark.parametrize(("changed", "words"), [
    ({"site_data": ["A=x"]}, r"1 folder\(s\) for 2 process\(es\) of this machine"),
    *[({"site_data": [wrong, "B=y"]}, "must be NAME=DIR") for wrong in (
        "A", "A=", "=x", ".=x", "..=x", "a/b=x")],
    ({"out": None}, "needs --out"), ({"folds": 2}, "has one split: --folds 1"),
    ({"table": "t.csv"}, "a --table belongs to --data"), ({"bn": "local"}, "with --bn local"),
    *[({name: value}, "takes the place of --data, --clients and --partition") for name, value in (
        ("data", "d"), ("clients", 3), ("partition", "iid"))]])
def test_what_a_hospital_may_not_ask_for_is_one_line(monkeypatch, changed, words):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=f"^--site-data: .*{words}"):
        process()._take_site(site_flags(**changed))


def test_a_hospital_takes_the_folder_of_its_own_number(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    job, args = process(1, world=6), site_flags(out=str(tmp_path))
    assert job._take_site(args) == "B" and job.folder == tmp_path / "B"
    assert (args.data, args.clients, args.classes) == ("y", 6, list(CLASSES))
    assert job._take_site(args := site_flags(out=None, resume=str(tmp_path), classes=["b"])) == "B"
    assert job.folder == tmp_path / "B" and args.classes == ["b"]


def test_a_hospitals_own_folder_may_be_there_only_where_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (tmp_path / "A").mkdir()
    with pytest.raises(InputError, match="A exists already"):
        process()._take_site(site_flags(out=str(tmp_path)))
    assert process()._take_site(site_flags(out=None, resume=str(tmp_path))) == "A"
    monkeypatch.setattr(processes.provenance, "restarts", lambda: 1)
    assert process()._take_site(site_flags(out=str(tmp_path))) == "A"


def test_the_first_process_measures_all_and_every_hospital_its_own():
    for job, measured in ((process(0), 3), (process(1), 0), (process(0, sites="AB"), 3),
                          (process(1, sites="AB"), 3)):
        assert job.part(np.arange(3)).tolist() == list(range(measured))


# ---- what crosses -------------------------------------------------------------------------------

def test_a_site_refuses_what_is_not_on_the_list():
    with pytest.raises(RuntimeError, match="pixels may not leave a site"):
        process(sites=["A", "B"])._cross("pixels", lambda: pytest.fail("it left"))
    assert process()._cross("pixels", lambda: "no site") == "no site"


def test_the_server_sends_its_state_and_others_their_updates(monkeypatch):
    state, sources = {"w": torch.zeros(5), "n": torch.tensor([3])}, []
    monkeypatch.setattr(processes.dist, "broadcast", lambda tensor, source: sources.append(source))
    monkeypatch.setattr(processes.dist, "isend", lambda tensor, target: target)
    process(0).share("state", state)
    process(1).share("state", state)
    assert set(sources) == {0}
    pending = process(1)._send(Update(1, 22, state, {"loss": 0.5}))
    assert [len(tensor) for tensor, _ in pending] == [2**16, 5, 1]
    assert {target for _, target in pending} == {0} and len(pending) == 3


def test_a_lost_process_is_told_in_the_words_of_the_network():
    def closed():
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:81] Connection closed by peer. See above.")
    with pytest.raises(LostProcess, match="^Connection closed by peer$"):
        process()._cross("update", closed)


def test_json_is_filled_up_to_its_size_and_never_longer():
    assert bytes(processes.as_bytes([1, None])) == b"[1, null]"
    assert bytes(processes.as_bytes("abc", 8)) == b'"abc"   '
    assert bytes(processes.as_bytes("abc", 5)) == b'"abc"'
    with pytest.raises(ValueError, match="6 bytes of JSON beside an update, at most 5 may travel"):
        processes.as_bytes("abcd", 5)


# ---- the end ------------------------------------------------------------------------------------

class Store:
    """Counts as torch's does; a process that held it may be dead."""

    def __init__(self, dead=False):
        self.count, self.dead = 0, dead

    def add(self, key, number):
        if self.dead:
            raise RuntimeError("Connection reset by peer")
        self.count += number
        return self.count


def test_the_end_of_a_job_is_told_once_or_better_twice_than_never():
    one, two, store = process(0), process(1), Store()
    one.store = two.store = store
    assert one.claim() and not two.claim() and not one.claim()
    one.store = two.store = Store(dead=True)
    assert one.claim() and two.claim()


class Ended(BaseException):
    """In the place of os._exit."""


def start(monkeypatch, main):
    """(exit code, stderr) of a process of torchrun that runs `main` and has met the others."""
    def leave(code):
        raise Ended(code)
    handlers, error = {}, io.StringIO()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for name, value in (("argv", ["/x/train.py"]), ("stderr", error), ("__stderr__", error)):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setattr(processes.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(processes.os, "_exit", leave)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: pytest.fail("it waits"))

    def run(argv, job):
        job.store = Store()
        main(lambda: handlers[signal.SIGTERM](signal.SIGTERM, None))
    with pytest.raises(Ended) as end:
        processes.start(run)
    return end.value.args[0], error.getvalue()


def test_how_a_process_of_a_job_ends(monkeypatch):
    def lost(stop):
        raise LostProcess("peer closed")
    resume = "; the last checkpoint is whole, go on with --resume and the run folder\n"
    assert start(monkeypatch, lambda stop: None) == (0, "")
    assert start(monkeypatch, lambda stop: sys.exit(7)) == (7, "")
    assert start(monkeypatch, lambda stop: stop()) == (
        143, "train.py: rank 0: stopped, as the job lost a process" + resume)
    assert start(monkeypatch, lost) == (
        1, "train.py: rank 0: another process is gone or silent (peer closed)" + resume)
