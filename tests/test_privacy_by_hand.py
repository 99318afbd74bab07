"""The privacy audit on a handful of images: its figures, its parts and its page, by hand."""

from checks import InputError

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

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


# ---- figures ------------------------------------------------------------------------------------

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
    assert membership.rates(score, none, some, np.zeros(4, int)) == []
    assert membership.rates(score, some, none, np.zeros(4, int)) == []
    assert len(membership.rates(score, some, ~some, np.zeros(4, int))) == 1


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
    (members, outside), again, other = taken
    assert members.shape == (2, 23) and np.array_equal(members[0], members[1])
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
    one = membership.sources(np.array([[1.], [0]]), [0, 1], dealt([0]))
    assert one["largest"] == one["permuted"]["value"] == one["value"] == 1


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
    assert found["A4"]["matrix"] == [[2, 0], [0, 2]] and found["A3"]["nobody"]["members"] == 1
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
    case = privacy.Case(Path(), {}, {}, args, SimpleNamespace(images="as trained on"))
    assert privacy.picture_groups(case) == ("read again" if read else "as trained on")
    assert seen == read


def test_a_split_or_clients_other_than_those_of_the_folder_are_refused(monkeypatch):
    split = {"train": np.arange(4), "val": np.array([4]), "test": np.array([5])}
    clients = [np.array([0, 1]), np.array([2, 3])]
    monkeypatch.setattr(privacy.tables, "read_split", lambda *a: (split, clients, ["0", "1"]))
    privacy.check_split(Path(), None, split, clients)
    for changed, dealt_anew in ((split | {"val": np.array([5])}, clients), (split, clients[::-1]),
                                (split, clients[:1])):
        with pytest.raises(InputError, match="another split, or other clients"):
            privacy.check_split(Path(), None, changed, dealt_anew)


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
