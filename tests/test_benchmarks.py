"""The benchmark runs and its last line holds what it promises; its timings are not asserted."""

import json
import runpy
from pathlib import Path

import pytest

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
