"""The benchmarks run and their last line holds what it promises; timings are not asserted."""

from checks import InputError

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Process, ranks, torchrun

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_throughput_prints_one_json_object_last(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["throughput.py", "--model", "shufflenet_v2_x0_5",
                                     "--image-size", "16", "--batch-size", "4", "--steps", "2",
                                     "--blocks", "2"])
    runpy.run_path(str(FOLDER / "throughput.py"), run_name="__main__")
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(out) == ["ours", "ceiling", "plain", "ours_over_ceiling", "ours_over_plain",
                         "average_share_of_round"]
    assert all(v > 0 for v in out.values()) and out["average_share_of_round"] < 1
    assert out["ours_over_plain"] == pytest.approx(out["ours"] / out["plain"])


def test_latency_prints_one_json_object_last(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["latency.py", "--model", "shufflenet_v2_x0_5", "--image-size",
                                     "32", "--repeats", "2", "--samples", "20"])
    runpy.run_path(str(FOLDER / "latency.py"), run_name="__main__")
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(out) == ["plain_ms_batch1", "ours_ms_batch1", "speedup_batch1", "plain_ms_batch32",
                         "ours_ms_batch32", "speedup_batch32", "lime_over_forward"]
    assert all(v > 0 for v in out.values())
    assert out["speedup_batch32"] == pytest.approx(
        out["plain_ms_batch32"] / out["ours_ms_batch32"], rel=0.02)


def test_scaling_prints_one_json_object_last_and_draws(capsys, monkeypatch, tmp_path):
    """Only the first job under torchrun is a command, the other runs are forked."""
    commands = []

    def launched(command, env, **_):
        under_torchrun, place = "torch.distributed.run" in command, command.index("--work")
        program, given = Path(command[place - 1]), command[place:]
        if under_torchrun and not commands:
            commands.append(command)
            assert command[1:place - 1] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
            done = [torchrun(2, FOLDER.with_name("tests") / "toy.py", program, *given).wait()]
        else:
            done = (ranks(2, [given] * 2, program=program) if under_torchrun else
                    [Process(program, given, threads=int(env["OMP_NUM_THREADS"])).wait()])
        assert [d.returncode for d in done] == [0] * len(done), done
        return done
    monkeypatch.setattr(subprocess, "run", launched)
    monkeypatch.setattr("sys.argv", ["scaling.py", "--model", "toynet", "--image-size", "16",
                                     "--clients", "2", "4", "--rounds", "2", "--blocks", "1",
                                     "--figure", str(tmp_path / "scaling.png")])
    runpy.run_path(str(FOLDER / "scaling.py"), run_name="__main__")
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(out) == ["speedup", "memory_most_over_fewest_clients", "updates_mb_a_round"]
    assert all(v > 0 for group in out.values() for v in group.values())
    sent = out["updates_mb_a_round"]
    assert sent["4"] == 2 * sent["2"]  # one model a client: two of four clients, one of two
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_contention_prints_one_json_object_last(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["contention.py", "--networks", "demonstration",
                                     "--environments", "scripts", "--steps", "1", "--blocks", "1"])
    runpy.run_path(str(FOLDER / "contention.py"), run_name="__main__")
    out = json.loads(capsys.readouterr().out.splitlines()[-1])["demonstration"]["scripts"]
    assert list(out) == ["idle_steps_per_second", "busy_over_idle", "two_over_idle"]
    assert all(v > 0 for v in out.values())


def test_contention_compares_medians_with_idle_and_with_what_libgomp_does_by_itself(capsys,
                                                                                    monkeypatch):
    program = runpy.run_path(str(FOLDER / "contention.py"), run_name="contention")
    idle = {"scripts": [2.0, 1.0, 9.0], "libgomp": [1.0] * 3, "passive": [4.0] * 3}
    monkeypatch.setitem(program["main"].__globals__, "measure", lambda network, variant, steps: {
        "idle": idle[variant].pop(), "two": 4.0, "busy": 8.0})
    monkeypatch.setattr("sys.argv", ["contention.py", "--networks", "resnet50"])
    program["main"]()
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out == {"resnet50": {
        name: {"idle_steps_per_second": 1 / s, "busy_over_idle": s / 8, "two_over_idle": s / 4,
               "idle_over_libgomp": 1 / s}
        for name, s in (("scripts", 2.0), ("libgomp", 1.0), ("passive", 4.0))}}


def test_growth_prints_one_json_object_last_and_draws(capsys, monkeypatch, tmp_path):
    """Its processes are calls here."""
    growth = runpy.run_path(str(FOLDER / "growth.py"))

    def called(command, **_):
        found = growth["work"](command[3], *map(int, command[4:]))
        return subprocess.CompletedProcess(command, 0, json.dumps(found) + "\n")
    monkeypatch.setattr(subprocess, "run", called)
    monkeypatch.setattr("sys.argv", ["growth.py", "--base", "8", "--clients", "4", "16",
                                     "--model", "toynet", "--image-size", "16",
                                     "--resnet-images", "0", "--out", str(tmp_path / "g.png")])
    growth["main"]()
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["images"] for r in out["images"]] == [8, 32, 128]
    assert [r["clients"] for r in out["clients"]] == [4, 16]
    assert all(0 < r["averaging"] < 1 for r in out["images"] + out["clients"])
    assert out["time_many_clients_over_few"] == pytest.approx(
        out["clients"][1]["seconds"] / out["clients"][0]["seconds"])
    assert (tmp_path / "g.png").exists()
    monkeypatch.setattr("sys.argv", ["growth.py", "--base", "8", "--clients", "4", "65"])
    with pytest.raises(InputError, match="--clients 65: more than half of 16 x --base images"):
        growth["main"]()


def test_start_prints_one_json_object_last(capsys, monkeypatch):
    """The six imports of Python are not measured here, only that they would be."""
    commands = []
    original = subprocess.run

    def called(command, **more):  # others may ask the machine how many cores it has
        if command[0] != sys.executable:
            return original(command, **more)
        return commands.append(command[1:])
    monkeypatch.setattr(subprocess, "run", called)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr("sys.argv", ["start.py", "--images", "40", "--image-size", "16", "--model",
                                     "shufflenet_v2_x0_5"])
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(
        ru_utime=len(commands), ru_stime=0.0))
    runpy.run_path(str(FOLDER / "start.py"), run_name="__main__")
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert commands[0] == ["-c", "import torch, torchvision"]
    assert ["audit.py", "--help"] in commands and len(commands) == 3 * 8
    assert set(out["help_over_import_torch"].values()) == {1.0}
    assert out["start_without_decoding_over_import_torch"] == pytest.approx(
        1 + out["read_cache_seconds"] + out["network_seconds"])
