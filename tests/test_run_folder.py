"""Run folders of older versions: read under today's names, or refused in one line."""

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
import train_federated
from reporting import run_folder

# What a run.json held before flags were renamed, beside what did not change.
OLD = {"mask_corner": True, "grey_world": False, "no_augment": False, "translation": 0.1,
       "momentum": 0.9, "local_only": False, "seeds": None, "site_data": None, "site_names": None,
       "share_scores": False}


def age(folder, **changes):
    """Turn a run folder of today into one of the version before; the weights stay."""
    run = json.loads((folder / "run.json").read_text())
    for name in ("remove", "augment", "site_data"):
        del run["arguments"][name]
    run["arguments"] |= OLD | changes
    (folder / "run.json").write_text(json.dumps(run))
    content = models.read_file(folder / "model.pt")
    content["interventions"] = ["mask_corner"]
    torch.save(content, folder / "model.pt")


@pytest.fixture
def aged(tree, tmp_path):
    out = train(tree, tmp_path / "run", "--rounds", 1, "--remove", "scale-bar", "--augment",
                "translate", "--image-size", 32)
    before = json.loads((out / "run.json").read_text())["arguments"]
    age(out)
    assert run_folder.read_run(out)["arguments"] == before
    return out


def test_an_old_run_is_predicted_explained_compared_and_audited_with_its_intervention(
        aged, tree, tmp_path, capsys):
    predict.main([str(aged), str(tree), "--exact", "--out", str(tmp_path / "p.csv")])
    explain.main([str(aged), "--per-class", "1", "--samples", "20", "--steps", "2",
                  "--lime-seeds", "2"])
    assert "not the network that was evaluated" not in capsys.readouterr().err
    audit.main(["run", str(aged)])
    assert json.loads((aged / "audit" / "audit.json").read_text())["interventions"] == ["scale-bar"]
    again = train(tree, tmp_path / "again", "--rounds", 1, "--remove", "scale-bar", "--augment",
                  "translate", "--image-size", 32, "--seed", 1)
    compare.main([str(aged), str(again), "--out", str(tmp_path / "comparison")])
    rows = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["rows"]
    assert next(iter(rows.values()))["runs"] == 2  # seeds of one configuration, old and new names


@pytest.mark.parametrize(("changes", "words"), [
    ({"momentum": 0.5}, "made with momentum"),
    ({"translation": 0.05}, "made with no_augment, translation"),
    ({"local_only": True}, "made with local_only")])
def test_what_this_version_cannot_continue_is_refused_in_one_line(aged, changes, words):
    age_again = json.loads((aged / "run.json").read_text())
    age_again["arguments"] |= changes
    (aged / "run.json").write_text(json.dumps(age_again))
    with pytest.raises(InputError, match=words):
        train_federated.main(["--resume", str(aged)])


def test_an_intervention_that_nobody_knows_is_never_left_out(aged, tree, tmp_path):
    content = models.read_file(aged / "model.pt")
    content["interventions"] = ["mask_corner", "sharpen"]
    torch.save(content, aged / "model.pt")
    with pytest.raises(InputError, match="unknown here: sharpen"):
        predict.main([str(aged), str(tree), "--out", str(tmp_path / "p.csv")])
    assert not (tmp_path / "p.csv").exists()
