"""The privacy audit on a handful of images: its figures, its parts and its page, by hand."""

from checks import InputError

import argparse
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import norm

from auditing import membership, privacy, privacy_page
from reporting import figures, metrics


def dealt(owner, labels=None, groups=None):
    """The sides of images of one class (or of these), each a group of its own (or of these)."""
    owner, n = np.asarray(owner), len(owner)
    split = {"train": np.flatnonzero(owner >= 0), "test": np.flatnonzero(owner < 0)}
    return membership.make_sides(
        np.zeros(n, int) if labels is None else np.asarray(labels), split,
        [np.flatnonzero(owner == k) for k in range(max(owner) + 1)],
        np.arange(n) if groups is None else np.asarray(groups))


def sides(labels, owner, groups=None, single=None):
    n = len(labels)
    return membership.Sides(np.arange(n), np.asarray(labels), np.arange(n) if groups is None else
                            np.asarray(groups), np.asarray(owner),
                            np.ones(n, dtype=bool) if single is None else np.asarray(single))


def auc(scores, members, labels):
    """The stratified AUC of one target, all others non-members."""
    members = np.asarray(members, dtype=bool)
    return membership.stratified_auc(np.asarray(scores, float)[None], members[None], ~members,
                                     np.asarray(labels), np.ones((1, len(members)), int))[0]


# ---- figures ------------------------------------------------------------------------------------

def test_the_hand_case():
    assert auc([2, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]) == 0.875


def test_pooling_classes_would_invent_leakage():
    """Within each class all scores tie. Members are mostly of class 0, which scores higher; as
    each class is on both sides, pooling can come close to 1 and not reach it."""
    labels = np.repeat([0, 1, 0, 1], [999, 1, 1, 999])
    members = np.repeat([True, False], 1000)
    assert auc(1.0 - labels, members, np.zeros(2000, int)) == 0.999
    assert auc(1.0 - labels, members, labels) == 0.5


def test_saturated_logits_keep_their_order():
    logits = np.array([[40, 0, 0, 0], [50, 0, 0, 0]], np.float32)
    low, high = membership.margin(logits, np.array([0, 0]))
    assert (low, high) == pytest.approx((40 - np.log(3), 50 - np.log(3)), abs=1e-12) and low < high
    p = torch.from_numpy(logits).softmax(1)[:, 0]
    assert p[0] == p[1]  # what float32 probabilities make of them
    assert membership.margin(np.array([[1., 2.], [3., 0.]]), np.array([1, 1])).tolist() == [1, -3]


def test_beta_bounds():
    zero, three = membership.rates(np.zeros(325, dtype=int), 10)
    assert zero["false_low"] == 0 and zero["false_high"] == pytest.approx(0.009175, abs=5e-7)
    assert three["false_positives"] == 3
    assert three["false_low"] == pytest.approx(0.003363, abs=5e-7)
    assert three["false_high"] == pytest.approx(0.026738, abs=5e-7)


def test_few_false_alarms_are_counted_at_zero_and_one_in_a_hundred():
    """200 non-members 0 … 199 of class 0, and as many of class 1, 1000 higher: less their medians
    the classes are alike. Members at 97.5, 99.5 and 99.75 above the median of their class;
    ties do not count as caught."""
    labels = np.repeat([0, 1], 203)
    one = np.r_[np.arange(200), 99.5 + 97.5, 99.5 + 99.5, 99.5 + 99.75]
    score = np.r_[one, one + 1000]
    member = np.tile(np.r_[np.zeros(200), np.ones(3)], 2).astype(bool)
    zero, four = membership.rates(*membership.caught(score, member, ~member, labels))
    assert (zero["false_positives"], zero["hits"], zero["members"]) == (0, 2, 6)
    assert (four["false_positives"], four["hits"], four["n"]) == (4, 4, 400)
    assert four["value"] == 4 / 6
    assert (four["low"], four["high"]) == pytest.approx((0.222778, 0.956728), abs=5e-7)
    rows = privacy_page.rate_rows("A1", [zero, four])
    assert rows[-1][1:3] == ["0.1%", "not resolvable below 1/400 = 0.0025"]
    few = membership.rates(*membership.caught(
        score[:203], member[:203], ~member[:203] & (score[:203] > 150), labels[:203]))
    assert [r["false_positives"] for r in few] == [0]
    assert privacy_page.rate_rows("A1", few)[-1][1] == "1.0%, 0.1%"


def simulate(rng, shift, members=120, outside=60, targets=1, spread=0.0):
    """An attack on normal scores of two classes; `targets` of them share what an image has."""
    n = members + outside
    owner = np.r_[np.arange(members) % targets, np.full(outside, -1)]
    scores = rng.normal(0, 1, n) + spread * rng.normal(0, 1, (targets, n))
    case = sides(np.arange(n) // targets % 2, owner)
    inside = case.members(range(targets))
    return membership.attack(scores + shift * inside, inside, case.outside, case)


def test_the_smallest_auc_is_found_in_four_of_five_cases(monkeypatch):
    monkeypatch.setattr(membership.metrics, "BOOTSTRAP", 200)
    rng = np.random.default_rng(0)
    nothing = [simulate(rng, 0) for _ in range(100)]
    smallest = np.mean([found["detectable"] for found in nothing])
    shift = np.sqrt(2) * norm.ppf(smallest)  # AUC = Φ(shift / √2)
    told = [abs(found["value"] - 0.5) > 1.96 * found["se"]
            for found in (simulate(rng, shift) for _ in range(300))]
    assert 0.74 < np.mean(told) < 0.86
    assert np.mean([abs(f["value"] - 0.5) > 1.96 * f["se"] for f in nothing]) < 0.12


def test_all_scores_of_an_image_are_drawn_together(monkeypatch):
    """Four targets whose non-members have nearly the same scores under each: drawn apart, the
    standard error would be half of what repeating the whole experiment shows."""
    monkeypatch.setattr(membership.metrics, "BOOTSTRAP", 200)
    rng = np.random.default_rng(1)
    found = [simulate(rng, 0, targets=4, members=400, outside=40, spread=0.05) for _ in range(60)]
    true = np.std([f["value"] for f in found], ddof=1)
    assert np.mean([f["se"] for f in found]) == pytest.approx(true, rel=0.2)
    one = found[0]
    assert (one["members"], one["non_members"]) == (400, 40)


def test_whole_groups_are_drawn():
    rng = np.random.default_rng(2)
    score = np.repeat(rng.normal(0, 1, 60), 4)
    owner = np.repeat([0, -1], 120)
    alone, grouped = (membership.attack(score[None], (owner == 0)[None], owner < 0, case)
                      for case in (sides(np.zeros(240, int), owner),
                                   sides(np.zeros(240, int), owner, np.arange(240) // 4)))
    assert alone["value"] == grouped["value"]
    assert grouped["se"] / alone["se"] == pytest.approx(2, rel=0.1)


def test_classes_and_sides_are_drawn_apart():
    """Each keeps its size in every resample, and equal sizes do not mean equal draws."""
    labels, member = np.repeat([0, 1, 0, 1], 20), np.repeat([True, False], 40)
    counts = membership.resample(member, ~member, labels, np.arange(80), 0).reshape(-1, 4, 20)
    assert (counts.sum(2) == 20).all()
    assert not any((counts[:, i] == counts[:, j]).all() for i in range(4) for j in range(i))


def test_permuting_members_within_a_class_changes_only_the_noise_of_the_seed():
    rng = np.random.default_rng(3)
    labels, owner = np.arange(300) % 3, np.where(np.arange(300) < 200, 0, -1)
    score = rng.normal(0, 1, 300) + labels
    mixed = np.arange(300)
    for c in range(3):
        here = np.flatnonzero((labels == c) & (owner == 0))
        mixed[here] = rng.permutation(here)
    a, b = (membership.attack(score[order][None], (owner == 0)[None], owner < 0,
                              sides(labels, owner)) for order in (np.arange(300), mixed))
    assert a["value"] == b["value"] and a["se"] != b["se"]
    assert a["se"] == pytest.approx(b["se"], rel=0.15)
    again, other = (membership.attack(score[None], (owner == 0)[None], owner < 0,
                                      sides(labels, owner), seed) for seed in (0, 1))
    assert again == a and other["se"] != a["se"]  # seed 0, unless another is given


def test_too_few_images_get_no_interval_and_a_constant_network_no_power():
    case = sides(np.zeros(35, int), np.r_[np.zeros(26, int), np.full(9, -1)])
    found = membership.attack(np.arange(35.)[None], case.members([0]), case.outside, case)
    assert found["value"] == 0 and found["low"] is found["detectable"] is None
    assert privacy_page.said(found, False) == "too few images"
    case = sides(np.zeros(60, int), np.repeat([0, -1], 30))
    found = membership.attack(np.zeros((1, 60)), case.members([0]), case.outside, case)
    assert found["value"] == 0.5 and found["detectable"] is None


def test_an_image_with_a_partner_in_training_is_left_out_on_both_sides():
    #       train: 0 1 2 3, test: 4 5 6; 7 validates and is on no side
    groups = np.array([9, 9, 5, 1, 1, 2, 2, 5])
    split = {"train": np.arange(4), "test": np.array([4, 5, 6]), "val": np.array([7])}
    found = membership.make_sides(np.zeros(8, int), split, [np.array([0, 2]), np.array([1, 3])],
                                  groups)
    assert found.indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert found.owner.tolist() == [0, 1, 0, 1, -1, -1, -1]
    # 0 and 1 are each other's; 2 has one in validation only; 3 has one in test only
    assert found.single.tolist() == [False, False, True, True, False, True, True]
    assert found.members([0, 1]).sum(1).tolist() == [1, 1] and found.outside.sum() == 2


def test_references_controls_and_sources_of_planted_memories():
    """Four models that score their own images by 3 higher, nothing else."""
    rng, n = np.random.default_rng(4), 500
    owner = np.r_[np.arange(400) % 4, np.full(100, -1)]
    case = sides(np.arange(n) // 4 % 4, owner)
    phi = rng.normal(0, 3, n) + rng.normal(0, 0.5, (4, n)) + 3 * case.members(range(4))
    assert membership.of_others(phi)[1] == pytest.approx(phi[[0, 2, 3]].mean(0))
    found = membership.described(phi - membership.of_others(phi), case.members(range(4)), case)
    raw = membership.attack(phi, case.members(range(4)), case.outside, case)
    assert found["low"] > 0.99 and raw["high"] < 0.85  # without reference, difficulty hides it
    null = membership.controls(phi, [0, 1, 2, 3], case)
    assert len(null["each"]) == 12 and sum(map(privacy_page.holds, null["each"])) >= 10
    nobody = membership.of_nobody(phi - membership.of_others(phi), case)["each"]
    assert len(nobody) == 4 and sum(map(privacy_page.holds, nobody)) >= 3
    assert all(one["members"] + one["non_members"] == 100 for one in nobody)
    source = membership.sources(phi, [0, 1, 2, 3], case)
    assert source["value"] > 0.98 and source["permuted"]["value"] == pytest.approx(0.25, abs=0.01)
    assert np.sum(source["matrix"]) == source["n"] == 400 and source["one_of_k"] == 0.25


def test_a_null_that_fails_at_one_hospital_is_seen():
    """Hospital 0 trained on images that were no hospital's, hospital 1 on those of hospital 2."""
    rng, owner = np.random.default_rng(5), np.r_[np.arange(400) % 4, np.full(100, -1)]
    case = sides(np.arange(500) // 4 % 4, owner)
    phi = rng.normal(0, 1, (4, 500))
    with mock.patch.object(membership, "attack") as attack:
        membership.of_nobody(phi, case)
    half = attack.call_args.args[1][0]
    phi[0, half] += 3
    phi[1, owner == 2] += 3
    nobody = membership.of_nobody(phi - membership.of_others(phi), case)["each"]
    assert nobody[0]["low"] > 0.9 and [privacy_page.holds(one) for one in nobody] == [False] * 4
    controls = membership.controls(phi, range(4), case)["each"]
    assert (1, 2) in [(one["model"], one["images"]) for one in controls if one["low"] > 0.5]
    name, span, least, _, _, words = privacy_page.null_row("nobody", nobody)
    assert (name, words) == ("*nobody*", "0 of 4 hold 0.5")
    assert span == f"{min(x['value'] for x in nobody):.4f} to {nobody[0]['value']:.4f}"
    assert least == f"{max(x['detectable'] for x in nobody):.4f}"
    few = {"value": 0.5, "low": None, "high": None, "detectable": None}
    assert privacy_page.null_row("x", [few]) == ["*x*", "–", "–", "–", "–", "too few images"]


def test_owners_are_permuted_within_their_class():
    """Hospital c owns 97 of 100 images of class c and its model favours that class, no image."""
    labels = np.repeat(np.arange(4), 100)
    owner = np.where(np.arange(400) % 100 < 97, labels, (labels + 1) % 4)
    phi = (labels == np.arange(4)[:, None]) * 5.0
    found = membership.sources(phi, [0, 1, 2, 3], sides(labels, owner))
    assert found["value"] == 0.97  # all of it is the class
    assert found["permuted"]["value"] == pytest.approx(0.97, abs=1e-12)


def test_every_pair_counts_once_whatever_its_class():
    """Class 0: 1 member above 3 non-members, 3 pairs won; class 1: 2 below 2, 4 pairs lost."""
    case = dealt([0, -1, -1, -1, 0, 0, -1, -1], labels=[0, 0, 0, 0, 1, 1, 1, 1])
    scores = np.array([[9., 1, 2, 3, 1, 2, 8, 9]])
    assert membership.attack(scores, case.members([0]), case.outside, case)["value"] == 3 / 7


@pytest.mark.parametrize(("inside", "outside", "told"), [
    (20, 10, True), (10, 20, True), (19, 10, False), (21, 9, False), (9, 21, False)])
def test_an_interval_needs_thirty_groups_in_all_and_ten_on_each_side(inside, outside, told):
    case = dealt(np.repeat([0, -1], [inside, outside]))
    score = np.random.default_rng(0).normal(0, 1, inside + outside)
    found = membership.attack(score[None], case.members([0]), case.outside, case)
    assert (found["low"] is not None) == (found["se"] is not None) == told
    assert (found["members"], found["non_members"]) == (inside, outside)


def test_the_standard_error_is_that_of_the_resamples_of_seed_0(monkeypatch):
    monkeypatch.setattr(metrics, "BOOTSTRAP", 7)
    case = dealt(np.repeat([0, -1], 20), labels=np.arange(40) % 2)
    score, inside = np.random.default_rng(0).normal(0, 1, (1, 40)), case.members([0])
    counts = membership.resample(inside[0], case.outside, case.labels, case.groups, 0)
    values = membership.stratified_auc(score, inside, case.outside, case.labels, counts)
    found = membership.attack(score, inside, case.outside, case)
    mean = values.sum() / 7
    assert found["se"] == pytest.approx((((values - mean) ** 2).sum() / 6) ** 0.5, rel=1e-12)
    assert found["detectable"] == pytest.approx(0.5 + 2.8 * found["se"], abs=1e-12)


def test_the_draws_of_a_stratum_are_those_of_its_own_seed():
    """Four times the class, and 2 for members or 1 for others: published figures repeat."""
    labels, inside = np.repeat([0, 1], 20), np.tile([True, False], 20)
    counts = membership.resample(inside, ~inside, labels, np.arange(40), 5)
    for c in (0, 1):
        for side, number in ((inside, 4 * c + 2), (~inside, 4 * c + 1)):
            take = np.flatnonzero((labels == c) & side)
            assert np.array_equal(counts[:, take], metrics.resample(take, 1000, [5, number]))


def test_without_hospitals_all_training_images_are_those_of_number_0():
    split = {"train": np.array([0, 3]), "test": np.array([1])}
    found = membership.make_sides(np.zeros(4, int), split, [], np.arange(4))
    assert found.owner.tolist() == [0, -1, 0] and found.indices.tolist() == [0, 1, 3]


def test_rates_need_images_on_both_sides():
    score, some, none = np.arange(4.), np.array([True, True, False, False]), np.zeros(4, bool)
    for member, outside, count in ((none, some, 0), (some, none, 0), (some, ~some, 1)):
        found = membership.caught(score, member, outside, np.zeros(4, int))
        assert len(membership.rates(*found)) == count


def test_the_curve_is_the_mean_share_caught_over_targets():
    """Non-members at 0, 1, 2, 3; members of the first target at 2.5 and 0.5, of the other at 9."""
    case = dealt([-1, -1, -1, -1, 0, 0, 1])
    score = np.array([0, 1, 2, 3, 2.5, 0.5, 9])
    found = membership.described(np.stack([score, score]), case.members([0, 1]), case)
    assert found["curve"] == [(0 + 1) / 2, (0.5 + 1) / 2, (0.5 + 1) / 2, 1]
    assert [one["members"] for one in found["targets"]] == [2, 1]
    assert [one["rates"][0]["hits"] for one in found["targets"]] == [0, 1]


def test_a_control_takes_the_model_of_another_hospital_less_the_mean_of_the_rest():
    """Hospitals 1, 3 and 4; the images of 3 under the model of 1 need the model of 4, and so on."""
    case = dealt([1, 1, 3, 3, 4, 4, -1, -1, 0])
    phi = np.random.default_rng(0).normal(0, 1, (3, 9))
    found = membership.controls(phi, [1, 3, 4], case)["each"]
    assert [(one["model"], one["images"]) for one in found] == [
        (3, 1), (4, 1), (1, 3), (4, 3), (1, 4), (3, 4)]
    for one in found:
        model, images = [1, 3, 4].index(one["model"]), [1, 3, 4].index(one["images"])
        score = phi[model] - phi[3 - model - images]
        won = [score[i] > score[j] for i in (2 * images, 2 * images + 1) for j in (6, 7)]
        assert one["value"] == sum(won) / 4
    two = membership.controls(phi[:2], [1, 3], case)["each"]  # of two models none is left over
    assert [one["value"] for one in two] == [
        np.mean([phi[1 - k][i] > phi[1 - k][j] for i in (2 * k, 2 * k + 1) for j in (6, 7)])
        for k in (0, 1)]


def test_half_of_each_class_takes_the_members_place_in_whole_groups(monkeypatch):
    taken = []
    monkeypatch.setattr(membership, "attack", lambda scores, members, outside, sides: taken.append(
        (members, outside)))
    labels = np.repeat([0, 1, 2, 0], [10, 4, 6, 3])
    case = dealt(np.repeat([-1, 0], [20, 3]), labels, np.r_[np.arange(20) // 2, 90:93])
    for arguments in ([], [0], [1]):  # seed 0 is the default
        membership.of_nobody(np.zeros((2, 23)), case, *arguments)
    (members, outside), second, again, _, other, _ = taken  # of each two hospitals
    assert members.shape == (1, 23)
    assert np.array_equal(members, second[0]) and np.array_equal(outside, second[1])
    assert np.bincount(labels[members[0]]).tolist() == [6, 2, 4]  # 3 of 5, 1 of 2, 2 of 3 groups
    assert np.array_equal(outside, case.outside & ~members[0]) and not members[0][20:].any()
    assert (members[0][0:20:2] == members[0][1:20:2]).all()
    assert np.array_equal(members, again[0]) and not np.array_equal(members, other[0])


def test_whose_image_by_hand():
    """Hospitals 2 and 5: of three images of the first two are rightly attributed, and none of the
    other's one; the largest hospital has three of four."""
    case = dealt([2, 2, 2, 5, -1, 0])
    phi = np.array([[5, 5, 1, 9, 0, 0], [1, 1, 5, 1, 9, 9.]])
    found = membership.sources(phi, [2, 5], case)
    assert (found["n"], found["value"], found["one_of_k"], found["largest"]) == (4, 0.5, 0.5, 0.75)
    assert found["matrix"] == [[2, 1], [1, 0]]
    assert found == membership.sources(phi, [2, 5], case, seed=0)
    assert found["permuted"] != membership.sources(phi, [2, 5], case, seed=1)["permuted"]
    right = found["permuted"]["value"] * 4 * 1000  # in a thousand permutations
    assert right == pytest.approx(round(right), abs=1e-6)
    one = membership.sources(np.array([[1.], [0], [0]]), [0, 1, 2], dealt([0]))
    assert one["largest"] == one["permuted"]["value"] == one["value"] == 1
    assert one["matrix"] == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


# ---- parts of the audit -------------------------------------------------------------------------

class Holder:
    """A network whose state is the φ that it gives."""

    def load_state_dict(self, state):
        self.state = state


def test_images_with_a_partner_are_compared_with_such_images_alone(tmp_path, monkeypatch):
    """0 and 1 are one group in training; 2 and 6, 3 and 7 are partners across the two parts."""
    case_sides = dealt([0, 1, 0, 1, 0, 1, -1, -1, -1, -1], groups=[0, 0, 2, 3, 4, 5, 2, 3, 8, 9])
    #                    with partner 0, 1 | single 2 … 5  | with partner 6, 7 | single 8, 9
    best = np.array([5., 1, 10, 20, 30, 40, 3, 0, 25, 15])
    monkeypatch.setattr(privacy, "phi", lambda run, sides, progress: run.model.state)
    monkeypatch.setattr(privacy.models, "read_file", lambda path: {"state": best})
    run = SimpleNamespace(model=Holder(), clients={"": [np.array([0, 2, 4]), np.array([1, 3, 5])]})
    case = privacy.Case(tmp_path, {}, dict.fromkeys(privacy.ATTACKS[1:], "not tried"),
                        argparse.Namespace(partition="iid"), run)
    found = privacy.measure_part(case, "", case_sides, -best, str)["A1"]
    partner = found["with_partner"]
    assert (partner["value"], partner["members"], partner["non_members"]) == (3 / 4, 2, 2)
    assert (found["best"]["value"], found["best"]["members"]) == (5 / 8, 4)
    assert found["placebo"]["value"] == 3 / 8 and found["last"] is None
    assert [one["value"] for one in found["hospitals"]] == [2 / 4, 3 / 4]


def test_the_server_compares_an_update_with_the_others_of_its_round():
    """Difficulty 0 … 50 hides a memory of 3, unless it is taken off; one update has no other."""
    case = dealt([1, 1, 4, 4, -1, -1])
    phi = np.arange(0, 60, 10) + 3. * case.members([1, 4])
    found = privacy.of_round({1: phi[0], 4: phi[1]}, 7, case)
    assert (found["round"], found["hospitals"]) == (7, [1, 4])
    assert found["A3"]["value"] == found["A4"]["value"] == 1
    assert found["A4"]["matrix"] == [[2, 0], [0, 2]] and [
        one["members"] for one in found["A3"]["nobody"]["each"]] == [1, 1]
    assert privacy.of_round({4: phi[1]}, 1, case) == {
        "round": 1, "hospitals": [4], "A3": None, "A4": None}


@pytest.mark.parametrize(("size", "remove", "read"), [
    (224, [], []), (64, [], [(224, [])]), (224, ["colour"], [(224, [])])])
def test_near_duplicates_are_looked_for_at_224_pixels_with_nothing_removed(monkeypatch, size,
                                                                           remove, read):
    seen = []
    monkeypatch.setattr(privacy.data, "load", lambda args: seen.append(
        (args.image_size, args.remove)) or "read again")
    monkeypatch.setattr(privacy.duplicates, "find_groups", lambda images: (images, None))
    args = argparse.Namespace(data="x", image_size=size, remove=remove)
    found = privacy.picture_groups(args, "as trained on")
    assert found == ("read again" if read else "as trained on")
    assert seen == read


def test_a_split_or_clients_other_than_those_of_the_folder_are_refused(monkeypatch):
    split = {"train": np.arange(4), "val": np.array([4]), "test": np.array([5])}
    clients = [np.array([0, 1]), np.array([2, 3])]
    monkeypatch.setattr(privacy.run_folder, "read_split", lambda *a: (split, clients, ["0", "1"]))
    privacy.run_folder.check_split(Path(), None, split, clients)
    for changed, dealt_anew in ((split | {"val": np.array([5])}, clients), (split, clients[::-1]),
                                (split, clients[:1])):
        with pytest.raises(InputError, match="do not give its split or clients"):
            privacy.run_folder.check_split(Path(), None, changed, dealt_anew)


@pytest.mark.parametrize(("folds", "place"), [({}, "run"), ({"folds": 1}, "run"),
                                              ({"folds": 2}, "run/fold1")])
def test_a_run_made_before_folds_is_one_split(monkeypatch, folds, place):
    class Read(Exception):
        pass

    def read(folder, *rest):
        raise Read(folder.as_posix())
    arguments = {"split": "random", "bn": "average", "rounds": 1, "clients": 4, "partition": "iid"}
    monkeypatch.setattr(privacy.run_folder, "read_run", lambda f: {"arguments": arguments | folds})
    monkeypatch.setattr(privacy.finished, "read_arguments", read)
    with pytest.raises(Read, match=f"^{place}$"):
        privacy.prepare(Path("run"), None, replay=True)


# ---- the page -----------------------------------------------------------------------------------

def test_the_largest_difference_is_told_to_three_digits_or_that_there_is_none():
    def line(**proof):
        return privacy_page.proof({"parts": {"": {"replay": proof | {"differs": {}}}}})
    assert "**no**, by 0.123 (" in line(equal=False, by=0.123456)
    assert "**no**, they cannot be compared (" in line(equal=False, by=None)
    assert line(equal=False, by=None).endswith("Machine and versions: the same.")


@pytest.fixture
def drawn(monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path, dpi: kept.append(figure))
    return kept


def spans(patch):
    """Lowest and highest x of a patch, in the units of its axis."""
    x = patch.get_path().transformed(patch.get_patch_transform()).vertices[:, 0]
    return x.min(), x.max()


def test_every_auc_is_drawn_with_its_interval_and_nulls_in_grey(drawn, tmp_path):
    """A placebo outside of its own interval is drawn without an arm on that side."""
    best = {"value": 0.7, "low": 0.6, "high": 0.9, "curve": [0, 0, 0.75, 1], "members": 8}
    part = {"best": best, "last": None, "hospitals": [], "with_partner": {"low": None},
            "placebo": {"value": 0.5, "low": 0.52, "high": 0.55}}
    privacy_page.plot_membership({"names": [], "parts": {"": {"A1": part}}}, tmp_path / "x.png")
    roc, aucs = drawn[0].axes
    arms = [line.get_segments()[0][:, 0].tolist() for line in aucs.collections]
    assert np.array(arms) == pytest.approx(np.array([[0.5, 0.55], [0.6, 0.9]]))
    points = [line for line in aucs.lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_color()) for line in points] == [
        (0.5, "0.6"), (0.7, "C0")]
    assert [t.get_text() for t in aucs.get_yticklabels()] == ["placebo: before training",
                                                              "A1, model.pt"]
    assert [0.5, 0.5] in [list(line.get_xdata()) for line in aucs.lines]  # what tells nothing
    curve, chance = roc.lines
    assert curve.get_xdata().tolist() == [1 / 4, 2 / 4, 3 / 4]
    assert curve.get_ydata() == pytest.approx([0, 0.75, 1], abs=1e-8)
    assert list(chance.get_xdata()) == list(chance.get_ydata()) and chance.get_xdata()[1] == 1
    assert chance.get_xdata()[0] < 1 / 12  # below all that is shown
    assert spans(roc.patches[0]) == pytest.approx((1 / 12, 1 / 4))  # not resolvable


def test_attributions_are_shaded_by_their_share_of_a_row(drawn, tmp_path):
    """A hospital of one image, one of none, and a half: white letters on more than half only."""
    matrix = [[2, 1, 1], [0, 1, 0], [0, 0, 0]]
    one = {"round": 3, "hospitals": [4, 0, 2], "A4": {"matrix": matrix}}
    result = {"names": list("abcde"), "parts": {"": {"rounds": [one, one | {"round": 4}, {
        "round": 5, "A4": None}]}}}
    privacy_page.plot_server(result, tmp_path / "x.png")
    first, second = drawn[0].axes
    assert first.images[0].get_array().tolist() == [[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 0]]
    assert first.images[0].get_clim() == (0, 1)
    assert [text.get_color() == "white" for text in first.texts] == [False] * 4 + [True] + [
        False] * 4
    assert first.texts[1].get_position() == (1, 0)
    for axis, labels in ((first, list("eac")), (second, [])):
        assert [t.get_text() for t in axis.get_xticklabels()] == list("eac")
        assert [t.get_text() for t in axis.get_yticklabels() if t.get_text()] == labels
    assert (first.get_ylabel(), second.get_ylabel()) == ("image of", "")
    assert second.get_title() == "updates of round 4"
    privacy_page.plot_server({"parts": {"": {"rounds": [one | {"A4": None}]}}}, tmp_path / "x.png")
    assert len(drawn) == 1  # nothing to draw
