"""What an audit counts over splits, probes and interventions, and what its pages say of it."""

from checks import InputError

import argparse
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import toy_images, write_tree

import audit
from auditing import probes
from dataset import interventions, splits, table
from reporting.terminal import show


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


# ---- the data -----------------------------------------------------------------------------------

def test_partners_are_counted_in_the_split_of_seed_42():
    """Images k and k + 30 are a group; the first 15 groups are of equal pixels."""
    images, groups = toy_images(60), np.arange(60) % 30
    images.digests = [str(i % 30 if i % 30 < 15 else i) for i in range(60)]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(42)).tolist()
    train, test = set(order[:48]), order[54:]
    found = audit.partners(images, groups)
    partners = [i for i in test if (i + 30) % 60 in train]
    identical = [i for i in partners if i % 30 < 15]
    assert (len(partners), len(identical)) == (5, 3)  # of seed 43 there are 6 and 2
    assert found["random"] == {"n": 6, "partners": 5, "identical": 3}
    assert found["grouped, these groups"] == {"n": 6, "partners": 0, "identical": 0}
    assert found["grouped"]["identical"] == 0 < found["grouped"]["partners"]
    none = found["blocked"]
    assert (none["n"], none["partners"], none["identical"]) == (None, None, None)
    assert "too few for a blocked split" in none["why"]
    assert list(found) == [*splits.SPLITS, "grouped, these groups"]


def test_partners_in_a_given_split_are_those_of_its_own_training_part(capsys):
    """Where no part validates, a tenth of the training part does, drawn with seed 42."""
    images, groups = toy_images(60), np.arange(60) % 30
    words = np.array(["train"] * 30 + ["test"] * 30)
    images.known["split"] = words
    expected = splits.given(words, images.labels.numpy(), 42)["train"]
    assert len(expected) == 27
    assert audit.partners(images, groups)["given"] == {"n": 30, "partners": 27, "identical": 0}
    groups = np.arange(60)
    groups[30:] = np.repeat(np.setdiff1d(np.arange(30), expected), 10)  # of those that validate
    assert audit.partners(images, groups)["given"]["partners"] == 0


def test_probes_are_judged_on_one_split_and_on_five_folds_without_validation(monkeypatch):
    monkeypatch.setattr(splits, "EMBARGO", 1)
    images, groups = toy_images(60), np.arange(60) // 2
    found = audit.probe_splits(images, groups)
    assert list(found) == ["default", "grouped", "blocked"]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(42)).tolist()
    (default,) = found["default"]
    assert default["test"].tolist() == sorted(order[54:])
    for kind in ("grouped", "blocked"):
        assert len(found[kind]) == 5 and not any(len(fold["val"]) for fold in found[kind])
        assert np.sort(np.concatenate([f["test"] for f in found[kind]])).tolist() == [*range(60)]
    for fold in found["grouped"]:
        assert not np.isin(groups[fold["test"]], groups[fold["train"]]).any()
        assert len(fold["train"]) + len(fold["test"]) == 60
    again = splits.make_folds("grouped", images.labels.numpy(), 5, 42, inner_val=0,
                              groups=groups.tolist())
    assert [f["test"].tolist() for f in found["grouped"]] == [f["test"].tolist() for f in again]
    monkeypatch.setattr(splits, "EMBARGO", 30)
    assert list(audit.probe_splits(images, groups)) == ["default", "grouped"]


def test_seed_42_has_its_place_among_the_seeds(monkeypatch):
    values = {0: 0.2, 1: 0.5, 2: 0.8, 3: 0.9, 42: 0.5}
    monkeypatch.setattr(splits, "make_split", lambda kind, labels, seed: (kind, seed))

    def score(x, labels, several, classifier):
        ((kind, seed),) = several
        assert (kind, classifier) == ("random", "1-nn")
        return {"value": values[seed]}
    monkeypatch.setattr(probes, "score", score)
    assert audit.seed_distribution(None, None, 4) == {
        "seeds": 4, "mean": pytest.approx(0.6), "sd": pytest.approx(0.1**0.5), "min": 0.2,
        "max": 0.9, "seed_42": 0.5, "share_below_seed_42": 0.25, "share_equal": 0.25,
        "values": [0.2, 0.5, 0.8, 0.9]}


def test_an_audit_of_data_goes_on_without_what_cannot_be_read(tmp_path, capsys):
    root = write_tree(tmp_path / "set", {"a": 20, "b": 20})
    (root / "a" / "bad.png").write_text("no picture")
    audit.main(["data", str(root), "--out", str(tmp_path / "out"), "--image-size", "32",
                "--split-seeds", "2"])
    found = json.loads((tmp_path / "out" / "audit.json").read_text("utf-8"))
    assert [path for path, _ in found["bad_files"]] == ["a/bad.png"]
    c, out = found["duplicates"], capsys.readouterr().out
    assert c["images"] == 40 and (
        f"{c['identical_copies']} identical copies, {c['near_pairs']} near pairs "
        f"({c['near_pairs_across_classes']} across classes), {c['groups']} groups\n") in out
    assert f"| colour means | {show(found['probes']['colour means']['default'])} |" in out


def test_patients_that_a_table_knows_are_partners_too(tmp_path):
    root = write_tree(tmp_path / "set", {"a": 20, "b": 20})
    paths = [f"{c}/{c}-{i:03d}.png" for c in "ab" for i in range(1, 21)]
    rows = [f"{path},{path[0]}{i // 4}" for i, path in enumerate(paths)]
    (tmp_path / "t.csv").write_text("\n".join(["path,patient", *rows]))
    audit.main(["data", str(root), "--image-size", "32", "--split-seeds", "2", "--table",
                str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "audit.json").read_text("utf-8"))
    partners = found["test_images_with_partner"]
    assert found["joined_with"] == ["patient"]
    assert partners["random"]["partners"] > 0 == partners["grouped, these groups"]["partners"]
    with open(tmp_path / "out" / "groups.csv", encoding="utf-8", newline="") as file:
        group = {path: name for path, label, name in list(csv.reader(file))[1:]
                 if label == path[0]}
    assert list(group) == paths
    for first in range(0, 40, 4):
        assert len({group[path] for path in paths[first:first + 4]}) == 1
    assert group[paths[0]] == paths[0] != group[paths[20]]


def test_the_page_of_the_data_says_what_was_found():
    text = "\n\n".join(audit.data_page({
        "data": "ALL", "fingerprint": "0123456789abcdefghij", "bad_files": [("x", "y")],
        "duplicates": {"images": 100, "near_pairs": 7}, "joined_with": ["patient"],
        "test_images_with_partner": {
            "random": {"n": 10, "partners": 4, "identical": 3},
            "blocked": {"n": None, "partners": None, "identical": None, "why": "too few"}},
        "probes": {"colour means": {"default": figure(0.5, 0.25, 0.75)}}, "majority_class": 0.375,
        "split_seeds": {"seeds": 4, "mean": 0.5, "sd": 0.25, "min": 0.2, "max": 0.8,
                        "seed_42": 0.6, "share_below_seed_42": 0.75, "share_equal": 0.125}}))
    for words in (
            "100 images, fingerprint `0123456789abcdef`; 1 unreadable.", "| near pairs | 7 |",
            "Partner: an image of the same group of near-duplicates, or of the same patient. ",
            "at least 30% of the field in common, correlation at least 0.6 there",
            "| random | 10 | 3 | 4 |", "| blocked | – | – | too few |",
            "Largest class: 0.3750.", "| colour means | 0.5000 (0.2500–0.7500) |",
            "over the split seeds 0 to 3: 0.5000 ± 0.2500 (0.2000 to 0.8000)",
            "Seed 42: 0.6000; 75.0% of the seeds lie below it, 12.5% are equal."):
        assert words in text


# ---- a run --------------------------------------------------------------------------------------

def test_a_network_is_compared_with_each_probe_on_its_test_part(monkeypatch):
    images = toy_images(12, classes=2)
    labels = images.labels.numpy()
    split = {"train": np.arange(6), "val": np.arange(0), "test": np.arange(6, 12)}
    opposite = np.append(labels[:6], 1 - labels[6:])
    monkeypatch.setattr(probes, "features", lambda images: {
        "label": labels[:, None], "opposite": opposite[:, None]})
    correct = np.array([True, True, False, True, False, True])
    found = audit.against_probes(correct, images, split)
    assert found["label"]["accuracy"]["value"] == 1
    assert found["label"]["difference"]["value"] == pytest.approx(-2 / 6)
    assert (found["label"]["mcnemar"]["a_only"], found["label"]["mcnemar"]["b_only"]) == (0, 2)
    assert found["opposite"]["accuracy"]["value"] == 0
    assert found["opposite"]["difference"]["value"] == pytest.approx(4 / 6)
    alike = audit.against_probes(correct, images, split, np.array([0, 0, 0, 1, 1, 1]))["label"]
    assert alike["mcnemar"] is None and alike["difference"]["low"] is None
    assert alike["difference"]["reason"].startswith("no interval: 2 of 2 groups hold a discordant")


def test_only_what_training_did_not_take_away_is_taken_away(monkeypatch):
    pixels, seen = toy_images(4, size=24).pixels, []

    def logits(trained, given):
        seen.append(given)
        return torch.tensor([[2.0, 1], [1, 2], [2, 1], [2, 1]])
    monkeypatch.setattr(audit.inference, "logits", logits)
    found = audit.under_interventions(SimpleNamespace(interventions=["colour"]), pixels,
                                      np.array([0, 1, 1, 0]), np.array([True, True, False, False]))
    assert list(found) == ["scale-bar"] and found["scale-bar"]["accuracy"]["value"] == 0.75
    assert found["scale-bar"]["difference"]["value"] == 0.25
    assert torch.equal(seen[0], interventions.apply(pixels, ["scale-bar"]))


def test_groups_are_those_of_the_table_which_must_name_every_image():
    images = toy_images(5)
    whole = {path: {"patient": p, "group": g} for path, p, g in zip(
        images.paths, ["A", "B", "A", "", ""], ["1", "2", "3", "2", ""], strict=True)}
    rows = dict(reversed(whole.items()))  # in any order

    def groups(rows, *columns):
        listed = table.Table("--table t.csv", ("path", *columns), rows)
        return audit.read_groups(listed, None, images).tolist()  # each named by its first image
    assert groups(rows, "patient", "group") == [0, 1, 0, 1, 4]
    assert groups(rows, "patient") == [0, 1, 0, 3, 4]
    assert groups(rows, "group") == [0, 1, 2, 1, 4]
    with pytest.raises(InputError, match="t.csv: has neither a column patient nor a column group"):
        groups(rows, "label")
    rows["another.png"] = {"patient": "Z", "group": "9"}  # a table may know more than the run used
    assert groups(rows, "patient") == [0, 1, 0, 3, 4]
    images.known["patient"] = np.array(list("ABA") + ["", ""])  # what the run itself knew
    found = audit.read_groups(None, argparse.Namespace(data=None), images)
    assert found.tolist() == [0, 1, 0, 3, 4]
    del rows[images.paths[3]]
    with pytest.raises(InputError, match=r"t.csv: 1 image\(s\) of .* not in it: c0/003.png"):
        groups(rows, "patient")


@pytest.mark.parametrize(("low", "words"), [
    (0.01, "**more**"), (0.0, "**nothing more that"), (-0.01, "**nothing more that"),
    (None, "**nothing more that")])
def test_a_network_knows_more_if_the_interval_of_the_difference_lies_above_zero(low, words):
    def probe(value, low):
        return {"accuracy": figure(value, 0.25, 0.75), "difference": figure(0.125, low, 0.5),
                "mcnemar": {"a_only": 5, "b_only": 2, "p": 0.453}}
    text = "\n\n".join(audit.run_page({
        "run": "x", "n": 40, "synthetic": False, "interventions": ["colour"], "accuracy": figure(1),
        "probes": {"weak": probe(0.25, 0.1 if low is None else -low), "best": probe(0.5, low)},
        "called_benign": ["a.png", "b.png"], "groups_in_test": 9, "groups": "duplicate groups",
        "clustered": figure(0.5, 0.4, 0.6), "without_partner": figure(None), "ece": 0.0625,
        "with_partner": figure(0.75, 0.7, 0.8),
        "under_interventions": {"scale-bar": {k: probe(0.5, 0)[k] for k in (
            "accuracy", "difference")}}}))
    assert f"The best of 2 probes on these images is *best*. The network knows {words}" in text
    difference = "0.1250 (no interval)" if low is None else f"0.1250 ({low:.4f}–0.5000)"
    for line in ("40 test images. Interventions in training: colour.", f"difference {difference}.",
                 f"| best | 0.5000 (0.2500–0.7500) | {difference} | 5 / 2 | 0.45 |",
                 "| all, by 9 duplicate groups | 0.5000 (0.4000–0.6000) |",
                 "| without a partner in training | – |",
                 "| with a partner in training | 0.7500 (0.7000–0.8000) |",
                 "| scale-bar | 0.5000 (0.2500–0.7500) | 0.1250 (0.0000–0.5000) |",
                 "- a.png\n- b.png", "Expected calibration error 0.0625."):
        assert line in text
    assert "SYNTHETIC" not in text


# ---- the flags ----------------------------------------------------------------------------------

def test_the_flags_of_an_audit_have_these_defaults_and_ends(monkeypatch):
    seen = []
    for kind in ("data", "run", "privacy"):
        monkeypatch.setattr(audit, f"audit_{kind}", seen.append)
    for line in ("data d", "data d --image-size 32 --split-seeds 2", "run r", "privacy r",
                 "privacy r --replay 0", "privacy r --replay 1"):
        audit.main(line.split())
    assert [(args.image_size, args.split_seeds) for args in seen[:2]] == [(224, 200), (32, 2)]
    assert [args.replay for args in seen[3:]] == [1, 0, 1]
    assert {args.device for args in seen[2:]} == {"auto"}
    for line in ("data d --image-size 31", "data d --split-seeds 1", "privacy r --replay 2", ""):
        with pytest.raises(SystemExit):
            audit.main(line.split())
