"""torchrun: the same bytes for any number of processes; what leaves a site; what a kill leaves."""

from checks import InputError

import argparse
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    BASE,
    ROOT,
    Process,
    equal,
    ranks,
    same_run,
    script,
    torchrun,
    write_tree,
)

import models
import train_federated
from reporting import finished, provenance
from training import processes
from training.processes import Job

SCRIPT = ROOT / "train_federated.py"
CODE = [p.relative_to(ROOT).as_posix() for room in ("", *provenance.ROOMS)
        for p in sorted((ROOT / room).glob("*.py"))]
CHANGED = {Path(name).parent: name for name in CODE}.values()  # one file at the top and a room
SITE = [x for x in BASE if x not in ("--rounds", "3")] + ["--rounds", "2"]


def ours(text):
    """Our own lines among torchrun's on stderr."""
    return [x for x in text.splitlines() if x.startswith("train_federated.py:")]


@pytest.fixture(scope="module")
def alone(tree, tmp_path_factory):
    """One process of one thread, by the flags that make order and state matter."""
    runs = {}

    def get(*flags):
        if flags not in runs:
            out = tmp_path_factory.mktemp("alone") / "run"
            done = script("--data", tree, *BASE, *flags, "--out", out, threads=1)
            assert done.returncode == 0, done.stderr
            runs[flags] = out
        return runs[flags]
    return get


HARD = ("--partition", "dirichlet", "--fraction", "0.5", "--clients", "5", "--optimizer", "sgd")


@pytest.mark.parametrize(("count", "flags"), [
    (2, HARD), (3, (*HARD, "--bn", "local")),
    (3, ("--clients", "2", "--bn", "recalibrate", "--model", "shufflenet_v2_x0_5"))])
def test_any_number_of_processes_gives_the_bytes_of_one(tree, alone, tmp_path, count, flags):
    """Three processes for two clients too: one of them never has work."""
    out = tmp_path / "run"
    job = ["--data", tree, *BASE, *flags, "--out", out]
    done = ranks(count, [job] * count)
    assert [d.returncode for d in done] == [0] * count, done
    one = alone(*flags)
    assert same_run(one, out)
    assert (one / "model.pt").read_bytes() == (out / "model.pt").read_bytes()
    drop = ("seconds",)
    results = [{k: v for k, v in json.loads((f / "results.json").read_text()).items()
                if k not in drop} for f in (one, out)]
    assert results[0] == results[1]
    assert [d.stdout.count("round 1/3") for d in done] == [1] + [0] * (count - 1)
    assert [ours(d.stderr) for d in done] == [[]] * count  # rank 0 alone speaks
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in out.iterdir())


def test_one_process_opens_nothing_and_sends_nothing(tree, tmp_path, monkeypatch):
    """No store, no group, no byte: a job of one runs the same lines and crosses nothing."""
    monkeypatch.setattr(torch.distributed, "rendezvous", None)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    job = Job()
    train_federated.main(["--data", str(tree), *BASE, "--out", str(tmp_path / "run")], job)
    assert (tmp_path / "run" / "results.json").exists()
    assert job.store is None and not torch.distributed.is_initialized()


def test_packed_states_come_back_in_dtype_shape_and_layout():
    state = {"conv": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
             "count": torch.tensor(7), "half": torch.ones(3, dtype=torch.float16),
             "mean": torch.randn(5)}
    flat = models.pack(state)
    assert [(x.dtype, len(x)) for x in flat] == [
        (torch.float32, 53), (torch.int64, 1), (torch.float16, 3)]
    back = models.unpack(flat, {k: torch.zeros_like(v) for k, v in state.items()})
    assert equal(back, state) and list(back) == list(state)
    assert all(back[k].stride() == v.stride() and back[k].dtype == v.dtype
               for k, v in state.items())


# Client 0 is slow, client 1 lost: no order of arrival may matter. With "all", everyone is lost.
POISON = f"""
import runpy, sys, time
import fedavg
who = sys.argv.pop()
original = fedavg.train_local
def poisoned(model, *args):
    record = original(model, *args)
    client = args[6][2]
    time.sleep(1.0 if client == 0 else 0)
    if who in (str(client), "all"):
        next(model.parameters()).data.fill_(float("nan"))
    return record
fedavg.train_local = poisoned
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def test_skewed_clients_and_a_lost_one_give_the_bytes_of_one_process(tree, tmp_path):
    flags = ["--data", tree, *BASE, "--rounds", 2, "--clients", 5, "--partition", "dirichlet"]
    one = Process(POISON, [*flags, "--out", tmp_path / "one", "1"], threads=1).wait()
    assert one.returncode == 0 and one.stderr.count("client 1 is not finite") == 2, one
    two = ranks(2, [[*flags, "--out", tmp_path / "two", "1"]] * 2, program=POISON)
    assert [d.returncode for d in two] == [0, 0], two
    assert same_run(tmp_path / "one", tmp_path / "two")
    assert two[0].stderr == one.stderr and two[1].stderr == ""


def test_all_updates_lost_ends_every_process_with_one_line(tree, tmp_path):
    done = ranks(2, [["--data", tree, *BASE, "--out", tmp_path / "run", "all"]] * 2, program=POISON)
    assert [d.returncode for d in done] == [1, 1], done
    assert done[0].stderr.splitlines()[-1] == (
        f"no client's update is finite; the last good state is kept in {tmp_path / 'run'}")
    assert done[1].stderr == ""
    assert models.read_file(tmp_path / "run" / "last.pt")["round"] == 0


# ---- faults -----------------------------------------------------------------------------------

def rank_processes(rank, word):
    """Living processes of a job with `word` in their command line, by RANK."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                inside = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if f"RANK={rank}".encode() in inside and word.encode() in command:
                found.append(int(folder.name))
    return found


# A command of torchrun that knows the toy network and takes its time, so that it can be killed.
SLOW = f"""
import runpy, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import helpers, fedavg
original = fedavg.train_local
def slow(*args):
    time.sleep(0.5)
    return original(*args)
fedavg.train_local = slow
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def kill_round_by_round(tree, out, victims, *launch):
    """A job under torchrun of which one process after another is killed, in round 2, in round 3;
    (stderr, exit code)."""
    program = out.parent.with_name("program") / "train_federated.py"
    program.parent.mkdir(exist_ok=True)
    program.write_text(SLOW)
    job = torchrun(2, *launch, program, "--data", tree, *BASE, "--out", out)
    deadline, lines = time.monotonic() + 120, out / "history.jsonl"
    for rounds, rank in enumerate(victims, 1):
        while not lines.exists() or lines.read_text().count("\n") < rounds:
            assert time.monotonic() < deadline and job.process.is_alive()
            time.sleep(0.05)
        (found,) = rank_processes(rank, str(out))
        os.kill(found, signal.SIGKILL)
    done = job.wait()
    assert not rank_processes(0, str(out)) and not rank_processes(1, str(out))  # no orphan
    return done.stderr, done.returncode


def test_a_killed_process_ends_the_job_with_one_line_and_it_resumes(tree, alone, tmp_path):
    out = tmp_path / "here" / "run"
    errors, code = kill_round_by_round(tree, out, [1])
    assert code != 0 and len(ours(errors)) == 1 and "--resume" in ours(errors)[0], errors
    assert not (out / "results.json").exists()
    done = ranks(2, [["--resume", out]] * 2, together=True)
    assert [d.returncode for d in done] == [0, 0], done
    assert same_run(alone(), out)


@pytest.fixture(scope="module")
def restarted(tree, tmp_path_factory):
    """One job in which torchrun restarts both processes twice: rank 0 is killed, then rank 1."""
    out = tmp_path_factory.mktemp("restarted") / "here" / "run"
    return out, *kill_round_by_round(tree, out, [0, 1], "--max-restarts", "2")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_elastic_restart_continues_its_own_folder_to_the_same_bytes(alone, restarted, rank):
    out, errors, code = restarted
    assert code == 0 and len(ours(errors)) == 2, errors
    # of each restart one line, of the process that was left
    assert ours(errors)[rank].startswith(f"train_federated.py: rank {1 - rank}: "), errors
    assert same_run(alone(), out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["run"]


# What gloo of torch 2.6 now and then does at the end of a job: it joins threads that never end.
STUCK = f"""
import atexit, runpy, threading, time
import torch.distributed as dist
dist.destroy_process_group = lambda: time.sleep(600)
atexit.register(time.sleep, 600)
threading.Thread(target=time.sleep, args=(600,)).start()
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("flags", "code"), [
    ([], 0), (["--clients", "5000"], 2), (["--help"], 0)])
def test_no_teardown_can_hold_a_job_that_has_ended(tree, tmp_path, flags, code):
    out = tmp_path / "run"
    results = ranks(2, [["--data", tree, *BASE, "--out", out, *flags]] * 2, program=STUCK)
    assert [r.returncode for r in results] == [code] * 2, results
    assert (out / "results.json").exists() == (not flags)  # not cut short either
    assert (f"report: {out}" in results[0].stdout) == (not flags)


@pytest.mark.parametrize(("other", "named"), [
    (["--lr", "0.02"], "--lr"), (["--batch-size", "4"], "--batch-size")])
def test_processes_that_differ_stop_before_training_and_name_it(tree, tmp_path, other, named):
    base = ["--data", tree, *BASE, "--out", tmp_path / "run"]
    results = ranks(2, [base, [*base[:-2], *other, *base[-2:]]])
    assert [r.returncode for r in results] == [2, 2]
    lines = [x for r in results for x in ours(r.stderr)]
    assert len(lines) == 1 and f"{named} of rank 1 differs" in lines[0], lines
    assert not (tmp_path / "run" / "last.pt").exists()


def test_other_data_or_code_is_named(tree, tmp_path):
    other = write_tree(tmp_path / "other", {"Benign": 22, "Early": 26, "Pre": 24}, seed=5)
    out = tmp_path / "run"
    results = ranks(2, [["--data", d, *BASE, "--out", out] for d in (tree, other)])
    assert "the data of rank 1 differs" in results[0].stderr
    assert results[1].stderr == ""
    assert len(CHANGED) == 6
    for number, file in enumerate(CHANGED):
        changed = tmp_path / f"code{number}"
        for source in CODE:
            (changed / source).parent.mkdir(parents=True, exist_ok=True)
            (changed / source).write_text((ROOT / source).read_text() + "# changed\n" * (
                source == file))
        program = ("import os, pathlib, runpy\nfrom reporting import provenance\n"
                   "if os.environ['RANK'] == '1':\n"
                   f"    provenance.ROOT = pathlib.Path({str(changed)!r})\n"
                   f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
        results = ranks(2, [["--data", tree, *BASE, "--out", tmp_path / file]] * 2,
                        program=program)
        assert "code of rank 1 differs" in results[0].stderr, results


def test_a_precision_that_auto_resolves_differently_is_named(tree, tmp_path):
    """A machine with native bf16 beside one without would be another computation."""
    program = ("import os, runpy, models, torch\n"
               "dtype = [None, torch.bfloat16][int(os.environ['RANK'])]\n"
               "models.pick_precision = lambda amp, device: dtype\n"
               f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
    out = tmp_path / "run"
    results = ranks(2, [["--data", tree, *BASE, "--out", out]] * 2, program=program)
    assert [r.returncode for r in results] == [2, 2]
    assert "the precision of --amp of rank 1 differs" in results[0].stderr, results


@pytest.mark.parametrize("late", [0, 1])
def test_what_every_process_refuses_is_one_line_under_torchrun(tree, tmp_path, late):
    """Whichever process comes to it first: torchrun ends the other."""
    program = tmp_path / "train_federated.py"
    program.write_text("import os, runpy, sys, time\n"
                       f"time.sleep(3 * (os.environ['RANK'] == '{late}'))\n"
                       f"sys.path.insert(0, {str(ROOT)!r})\n"
                       f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
    done = torchrun(2, program, *BASE, "--site-data", f"A={tree}", "--out", tmp_path / "x").wait()
    assert len(ours(done.stderr)) == 1 and "1 folder(s) for 2" in ours(done.stderr)[0], done.stderr
    assert done.returncode != 0 and not (tmp_path / "x").exists()


def test_a_second_process_that_alone_fails_speaks_for_itself_in_the_end(tree, tmp_path):
    done = script(*BASE, "--site-data", f"A={tree}", "--out", tmp_path / "x", env={
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and ours(done.stderr) == done.stderr.splitlines() != []
    assert "1 folder(s) for 2" in done.stderr


def test_a_process_that_loses_the_others_ends_with_code_1():
    program = ("from training import processes\n"
               "def main(argv, job):\n"
               "    job.store = type('Store', (), {'add': lambda *_: 1})()\n"
               "    raise processes.LostProcess('peer closed')\n"
               "processes.start(main)")
    done = Process(program, [], env={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}).wait()
    assert done.returncode == 1 and "is gone or silent (peer closed)" in done.stderr, done


def test_site_flags_are_refused_without_torchrun(tree, tmp_path):
    alone = script("--site-data", f"A={tree}", *BASE, "--out", tmp_path / "x")
    assert alone.returncode == 2 and "torchrun" in alone.stderr
    assert not (tmp_path / "x").exists()


# ---- sites with their own data ----------------------------------------------------------------

@pytest.fixture(scope="module")
def sites(open_place):
    write_tree(open_place / "A", {"Benign": 12, "Early": 16, "Pre": 14, "Pro": 10}, seed=1)
    write_tree(open_place / "B", {"Benign": 15, "Pro": 11}, seed=2)  # lacks two classes
    write_tree(open_place / "C", {"Benign": 8, "Foo": 9}, seed=3)
    return open_place


RECORDER = """
import json, os, sys
import torch, torch.distributed as dist
place, seen = sys.argv[-1] + '-payloads.json', []
for name in dir(dist):
    function = getattr(dist, name)
    if callable(function) and any(x in name for x in ('reduce', 'gather', 'scatter', 'broadcast',
                                                      'send', 'recv', 'all_to_all', 'object')):
        if isinstance(function, type) or name.startswith('_'):
            continue
        def wrapped(*a, original=function, name=name, **k):
            sends = name not in ('recv', 'irecv') and not (name == 'broadcast' and a[1] != RANK)
            if sends:
                x = a[0]
                text = x.numpy().tobytes().decode() if x.dtype == torch.uint8 else None
                seen.append([name, str(x.dtype), list(x.shape), text])
            return original(*a, **k)
        setattr(dist, name, wrapped)
RANK = int(os.environ['RANK'])
import train_federated
from training import processes
import matplotlib.backends.backend_agg, torch._dynamo, torch.utils._pytree
from PIL import Image
Image.init()
if os.environ['SITE_USER']:  # from here on, a user who sees its own folder only
    os.setgroups([])
    os.setgid(int(os.environ['SITE_USER']))
    os.setuid(int(os.environ['SITE_USER']))
def main(argv, job):
    train_federated.main(argv, job)
    json.dump(seen, open(place, 'w'))
sys.argv[0] = 'train_federated.py'
processes.start(main)
"""


@pytest.fixture(scope="module")
def site_run(sites):
    """Two sites as users of their own, each with its own folder and output, every payload kept."""
    if os.geteuid() != 0:
        pytest.skip("needs root to run as two other users")
    root = sites / "out"
    root.mkdir()
    users = (54321, 54322)
    outs = []
    for user, name in zip(users, "AB", strict=True):
        for path in (sites / name, *(sites / name).rglob("*")):
            os.chown(path, user, user)
        os.chmod(sites / name, 0o700)
        (root / name).mkdir()
        os.chown(root / name, user, user)
        outs.append(root / name / "run")
    results = ranks(2, [[*SITE, "--site-data", f"{called}={sites / name}", "--out", out]
                        for name, called, out in zip("AB", ("North", "South"), outs, strict=True)],
                    users, RECORDER)
    assert [r.returncode for r in results] == [0, 0], results
    other = subprocess.run(["/bin/ls", sites / "B"], user=users[0], capture_output=True,
                           check=False, cwd="/")
    assert other.returncode != 0  # the folders are closed to each other indeed
    return results, outs


def test_sites_keep_their_images_splits_and_predictions(site_run):
    results, (north, south) = site_run
    assert "North: 42 images" in results[0].stdout and "South: 22 images" in results[0].stdout
    assert results[1].stdout == ""  # rank 0 alone prints
    a = (north / "North" / "predictions.csv").read_text()
    b = (south / "South" / "predictions.csv").read_text()
    assert len(a.splitlines()) == 1 + 10 and len(b.splitlines()) == 1 + 4
    assert not (south / "North").exists() and not (north / "South").exists()
    pooled = json.loads((north / "results.json").read_text())
    own = [json.loads((f / n / "results.json").read_text())
           for f, n in ((north, "North"), (south, "South"))]
    confusion = sum(np.array(x["best"]["test"]["confusion"]) for x in own)
    assert np.array_equal(pooled["best"]["test"]["confusion"], confusion)
    assert pooled["best"]["test"]["n"] == 7 and pooled["best"]["test"]["roc_auc"] is None
    losses = [r["val_loss"] for r in finished.read_history(north)]
    for content in (pooled["best"], own[0]["best"], own[1]["best"],
                    models.read_file(south / "South" / "model.pt")):
        assert content["round"] == 1 + losses.index(min(losses))
    assert [c["n"] for c in pooled["best"]["test"]["clients"]] == [5, 2]
    loss = sum(x["best"]["val"]["loss"] * x["best"]["val"]["n"] for x in own) / 7
    assert pooled["best"]["val"]["loss"] == pytest.approx(loss, rel=1e-12)
    assert "North" in (north / "report.md").read_text()
    assert equal(models.read_file(north / "model.pt")["state"],
                 models.read_file(south / "South" / "model.pt")["state"])


def test_every_payload_is_on_the_list(site_run):
    """All that both processes handed to torch.distributed, one by one, in order."""
    _, outs = site_run
    state = models.read_file(outs[0] / "model.pt")["state"]
    floats = sum(v.numel() for v in state.values() if v.is_floating_point())
    whole = [("torch.float32", floats), ("torch.int64", sum(map(torch.numel, state.values()))
                                         - floats)]  # one model
    header = ("torch.uint8", 2**16)
    records = []
    for out in outs:
        with open(f"{out}-payloads.json", encoding="utf-8") as file:
            records.append(json.load(file))
    north, south = records
    sent = [(dtype, shape[0]) for name, dtype, shape, _ in south if name == "isend"]
    assert sent == [header, *whole] * 2  # of each round its own update, and nothing else
    assert not [x for x in north if x[0] == "isend"]
    assert {x[0] for x in north + south} == {"broadcast", "isend"}
    tensors = [(dtype, shape[0]) for name, dtype, shape, text in north
               if text is None and shape != [1]]
    assert tensors == whole * 4  # the state: at the start, after each round, of the best round
    told = [json.loads(text) for *_, text in south if text is not None]
    name, facts, memory, counts, *rest = told  # memory: no client's BatchNorm, no history yet
    assert (name, memory, counts) == ("South", [[], [], []], [13, 0, 0, 9])
    assert facts.pop("failed") is False
    assert all(re.fullmatch("[0-9a-f]{64}", x) for x in facts.values())  # digests of flags and code
    for update, memory, tally in (rest[:3], rest[3:6]):
        assert update[:2] == [1, 22] and memory == [[], [], []]
        assert {k for k, v in update[2].items() if v is not None} == {"site", "images", "steps",
                                                                      "loss"}
        assert len(tally) == 3 and tally[0] == 2
    assert len(rest) == 10  # last and best model, validation and test: confusion, n, loss
    assert all(np.sum(x[0]) == x[1] == 2 and isinstance(x[2], float) for x in rest[6:])
    memory = [json.loads(text) for *_, text in north if text is not None][4::2][:2]
    for _, _, clients in memory:  # what the server tells every site of the others
        assert [c["site"] for c in clients] == ["North", "South"]
        assert all(c["accuracy"] is c["update_norm"] is c["skipped_steps"] is None
                   for c in clients)


def test_a_site_with_an_unknown_class_is_refused_and_named(sites, tmp_path):
    done = ranks(2, [[*SITE, "--site-data", f"North={sites / 'A'}", f"Third={sites / 'C'}",
                      "--out", tmp_path / "run"]] * 2, together=True)
    lines = [x for d in done for x in ours(d.stderr)]
    assert [d.returncode for d in done] == [2, 2], done
    assert any("Third" in x and "Foo" in x for x in lines), done
    assert "Traceback" not in "".join(d.stderr for d in done)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_sites_resume_to_the_same_bytes(sites, tmp_path):
    def train(*arguments):
        done = ranks(2, [arguments] * 2, together=True)
        assert [d.returncode for d in done] == [0, 0], done
    flags = [*SITE, "--site-data", f"one={sites / 'A'}", f"two={sites / 'B'}"]
    train(*flags, "--out", tmp_path / "whole")
    train(*flags, "--rounds", "1", "--out", tmp_path / "cut")
    run = json.loads((tmp_path / "cut" / "run.json").read_text())  # as if killed in round 2
    run["arguments"]["rounds"] = 2
    (tmp_path / "cut" / "run.json").write_text(json.dumps(run))
    train("--resume", tmp_path / "cut")
    for name in ("model.pt", "one/predictions.csv", "two/predictions.csv", "two/model.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert (tmp_path / "cut" / "two" / "report.md").exists()


def test_sites_need_names_of_their_own(sites, tmp_path):
    for first, second, words in (("A", "A", "needs a name of its own"), ("A", "", "NAME=DIR")):
        flags = [*SITE, "--site-data", f"{first}={sites / 'A'}", f"{second}={sites / 'B'}",
                 "--timeout", "2", "--out", tmp_path / "run"]  # nobody here ends the one that waits
        done = ranks(2, [flags] * 2, together=True)
        assert [d.returncode for d in done] == [2, 2], done
        assert words in "".join(x for d in done for x in ours(d.stderr)), done
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "sites", "failed", "raised"), [
    (1, [], [False, True], InputError), (1, [], [True, True], SystemExit),
    (0, [], [True, True], InputError), (1, ["A", "B"], [True, True], InputError)])
def test_who_says_why_a_job_does_not_begin(monkeypatch, rank, sites, failed, raised):
    """The server, or the one process that fails alone; hospitals each say their own."""
    job = processes.Job()
    job.rank, job.world, job.sites = rank, 2, sites
    monkeypatch.setattr(job, "exchange", lambda kind, content: [{"failed": f} for f in failed])
    with pytest.raises(raised), job.preparing(argparse.Namespace()):
        raise InputError("the reason")
