"""Run folders of other versions: refused in one line, never a traceback."""

from checks import InputError

import json

import pytest
import torch
from helpers import train

import audit
import compare
import explain
import models
import predict
import train_central
import train_federated
from reporting import run_folder


@pytest.fixture
def run(tree, tmp_path):
    return train(tree, tmp_path / "run", "--rounds", 1, "--image-size", 32)


@pytest.mark.parametrize("main", [
    lambda run: train_federated.main(["--resume", run]),
    lambda run: train_central.main(["--like", run]), lambda run: explain.main([run]),
    lambda run: audit.main(["run", run]), lambda run: audit.main(["privacy", run]),
    lambda run: compare.main([run])])
def test_a_run_with_the_flags_of_an_older_version_is_refused(run, main):
    content = run_folder.read_run(run)
    del content["arguments"]["remove"]
    content["arguments"] |= {"mask_corner": True, "grey_world": False}
    (run / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="made by a version whose flags this one no longer reads"):
        main(str(run))


def test_a_flag_that_is_gone_cannot_be_resumed(run):
    content = run_folder.read_run(run)
    content["arguments"]["momentum"] = 0.5
    (run / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="made with momentum, which this version no longer has"):
        train_federated.main(["--resume", str(run)])


def test_another_commit_is_told_where_a_run_goes_on(run, capsys):
    content = run_folder.read_run(run)
    content["git"] = "0123abc"
    (run / "run.json").write_text(json.dumps(content))
    train_federated.main(["--resume", str(run)])
    assert "note: commit was 0123abc and is " in capsys.readouterr().err


def test_an_intervention_that_nobody_knows_is_never_left_out(run, tree, tmp_path):
    content = models.read_file(run / "model.pt")
    content["interventions"] = ["scale-bar", "sharpen"]
    torch.save(content, run / "model.pt")
    with pytest.raises(InputError, match="unknown here: sharpen"):
        predict.main([str(run), str(tree), "--out", str(tmp_path / "p.csv")])
    assert not (tmp_path / "p.csv").exists()


def test_weights_may_be_named_again_as_they_were(tree, tmp_path, monkeypatch):
    """run.json holds whole paths; a restarted process is called as before."""
    monkeypatch.chdir(tmp_path)
    train(tree, "a", "--rounds", 1)
    train(tree, "b", "--rounds", 1, "--weights", "a/model.pt")
    train_federated.main(["--resume", "b", "--weights", "a/model.pt"])
    with pytest.raises(InputError, match="--weights is .*/a/model.pt there, not b/model.pt"):
        train_federated.main(["--resume", "b", "--weights", "b/model.pt"])
