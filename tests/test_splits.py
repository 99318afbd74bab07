"""Splits and partitions: the paper's counts and hash, disjointness, determinism, refusals."""

from checks import InputError

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import splits
from dataset.images import Images
from dataset.parts import deal_part

ROOT = Path(__file__).parent.parent  # not from helpers, which would load the whole house again
PAPER = np.repeat(np.arange(4), (504, 985, 963, 804))  # ImageFolder order of the 3,256 images
PATHS = [f"c{y}/WBC-{i:03d}.jpg" for y, n in enumerate((504, 985, 963, 804))
         for i in range(1, n + 1)]


def counts(part):
    return np.bincount(PAPER[part], minlength=4).tolist()


def test_seed_42_gives_the_papers_counts_and_the_known_hash():
    split = splits.make_split("random", PAPER, 42)
    assert counts(split["train"]) == [389, 782, 782, 653]
    assert counts(split["val"]) == [56, 105, 97, 67]
    assert counts(split["test"]) == [59, 98, 84, 84]
    assert hashlib.sha256(split["test"].tobytes()).hexdigest() == \
        "9e08145627e4ed050db7a5cf4c7771a552783ad75b8a0aadecf6f65e1b9420af"


def test_random_split_is_torchs():
    parts = torch.utils.data.random_split(range(101), [81, 10, 10],
                                          torch.Generator().manual_seed(7))
    split = splits.make_split("random", np.arange(101) % 4, 7)
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        assert split[name].tolist() == sorted(part.indices)


def make(kind, seed=42):
    return splits.make_split(kind, PAPER, seed, paths=PATHS,
                             groups=[str(i // 3) for i in range(len(PAPER))])


@pytest.mark.parametrize("kind", splits.SPLITS)
def test_parts_are_sorted_disjoint_and_cover(kind):
    split = make(kind)
    parts = [split["train"], split["test"]]
    if kind == "stratified80":
        assert np.array_equal(split["val"], split["test"])
    else:
        parts.append(split["val"])
    joined = np.concatenate(parts)
    assert len(set(joined.tolist())) == len(joined)
    assert len(joined) == len(PAPER) - (8 * splits.EMBARGO if kind == "blocked" else 0)
    for part in split.values():
        assert part.dtype == np.int64 and np.array_equal(part, np.sort(part)) and len(part)


@pytest.mark.parametrize("kind", ["random", "stratified", "stratified80", "grouped"])
def test_split_seed_matters_and_repeats(kind):
    assert all(np.array_equal(make(kind)[p], make(kind)[p]) for p in ("train", "val", "test"))
    assert not np.array_equal(make(kind)["test"], make(kind, 43)["test"])


def test_stratified_keeps_class_shares():
    split = make("stratified")
    assert [len(split[p]) for p in ("train", "val", "test")] == [2606, 325, 325]
    for part in split.values():
        shares = np.array(counts(part)) / len(part)
        assert abs(shares - np.array([504, 985, 963, 804]) / 3256).max() < 0.003
    eighty = make("stratified80")
    assert [len(eighty[p]) for p in ("train", "val", "test")] == [2604, 652, 652]


def test_grouped_keeps_groups_together():
    split = make("grouped")
    owners = {p: {i // 3 for i in part.tolist()} for p, part in split.items()}
    assert not owners["train"] & owners["val"] and not owners["train"] & owners["test"]
    assert not owners["val"] & owners["test"]
    for part in ("val", "test"):  # as many whole groups of 3 (the last has 1) as fit into 325
        assert 323 <= len(split[part]) <= 325


def test_blocked_is_by_file_number_with_embargo():
    split = make("blocked")
    for c, n in enumerate((504, 985, 963, 804)):
        numbers = {p: [int(PATHS[i][-7:-4]) for i in part if PAPER[i] == c]
                   for p, part in split.items()}
        tenth = n // 10
        assert numbers["test"] == list(range(n - tenth + 1, n + 1))
        assert numbers["val"] == list(range(n - 2 * tenth - 29, n - tenth - 29))
        assert numbers["train"] == list(range(1, n - 2 * tenth - 59))


def test_file_numbers_sort_as_numbers():
    names = ["b/Snap_002 (1).jpg", "b/Snap_001 (10).jpg", "b/Snap_001 (9).jpg", "b/Sap_013 (1).jpg"]
    assert sorted(names, key=splits.file_number) == [names[2], names[1], names[0], names[3]]
    assert splits.file_number("set7/Snap.001.5 (12).jpg2")[0] == [1, 5, 12]  # no folder, no suffix


def test_ten_images_are_enough_and_parts_of_the_size_of_a_group_hold_it():
    split = splits.make_split("random", np.zeros(10, int), 0)
    assert [len(split[p]) for p in ("train", "val", "test")] == [8, 1, 1]
    split = splits.make_split("grouped", np.zeros(40, int), 0,
                              groups=[str(i // 4) for i in range(40)])
    assert [len(split[p]) for p in ("train", "val", "test")] == [32, 4, 4]


def test_a_stratified_part_has_an_image_of_each_class():
    """A tenth of 30 images is 3, of four classes: 4 images validate, 4 test."""
    split = splits.make_split("stratified", np.repeat([0, 1, 2, 3], [9, 7, 7, 7]), 0)
    assert [len(split[p]) for p in ("train", "val", "test")] == [22, 4, 4]
    folds = splits.make_folds("stratified", np.repeat([0, 1, 2, 3], 5), 2, 0, inner_val=0.1)
    assert [len(fold["val"]) for fold in folds] == [4, 4]


def test_small_sets_are_refused():
    with pytest.raises(InputError, match="too few"):
        splits.make_split("random", np.zeros(9, int), 0)
    with pytest.raises(InputError, match="too small"):
        splits.make_split("stratified", np.array([0] * 30 + [1]), 0)
    with pytest.raises(InputError, match="blocked"):
        splits.make_split("blocked", np.arange(100) % 2, 0, paths=[f"{i}.png" for i in range(100)])
    with pytest.raises(InputError, match="empty"):  # one group of everything
        splits.make_split("grouped", np.arange(50) % 2, 0, groups=["a"] * 50)


def test_twins_are_counted_against_training():
    digests = ["a", "b", "c", "a", "b", "d"]
    assert splits.count_twins(digests, np.array([3, 4, 5]), np.array([0, 2])) == 1
    assert splits.count_twins(digests, np.array([3, 4, 5]), np.array([0, 1])) == 2


# ---- clients ----------------------------------------------------------------------------------

TRAIN = splits.make_split("random", PAPER, 42)["train"]


def test_iid_clients_have_the_papers_sizes():
    parts = splits.partition("iid", PAPER, TRAIN, 4, 42)
    assert [len(p) for p in parts] == [651, 651, 651, 653]


@pytest.mark.parametrize("kind,clients", [
    (kind, clients) for kind in splits.PARTITIONS for clients in (1, 4, 16)
    if (kind, clients) != ("shards", 1)])  # one client of two classes cannot own four: below
def test_clients_share_nothing_and_lose_nothing(kind, clients):
    parts = splits.partition(kind, PAPER, TRAIN, clients, 42)
    joined = np.concatenate(parts)
    assert len(parts) == clients and min(map(len, parts)) > 0
    assert np.array_equal(np.sort(joined), TRAIN)
    if kind.endswith("equal"):
        assert [len(p) for p in parts[:-1]] == [len(TRAIN) // clients] * (clients - 1)
    again = splits.partition(kind, PAPER, TRAIN, clients, 42)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def skew(parts):
    """Mean total variation distance of the clients' class shares from the whole."""
    whole = np.bincount(PAPER[TRAIN], minlength=4) / len(TRAIN)
    return np.mean([abs(np.bincount(PAPER[p], minlength=4) / len(p) - whole).sum() / 2
                    for p in parts])


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet-equal"])
def test_dirichlet_skew_falls_with_alpha(kind):
    values = [skew(splits.partition(kind, PAPER, TRAIN, 8, 42, alpha=a)) for a in (0.1, 1.0, 100.0)]
    assert values[0] > values[1] > values[2] and values[0] > 0.4 and values[2] < 0.1


def test_dirichlet_shares_are_the_fractions_drawn():
    """Client k gets what lies between the k-th and the next cumulated fraction of a class."""
    of = np.bincount(PAPER[TRAIN])[:, None]
    for alpha, more in ((0.3, {}), (2.0, {"alpha": 2.0})):  # 0.3 where nothing else is said
        fractions = np.random.default_rng([42, 1]).dirichlet([alpha] * 3, 4)
        edges = np.round(fractions.cumsum(1) * of)
        parts = splits.partition("dirichlet", PAPER, TRAIN, 3, 42, **more)
        assert np.array_equal([np.bincount(PAPER[p], minlength=4) for p in parts],
                              np.diff(edges, axis=1, prepend=0).T)


def test_shards_give_each_client_exactly_k_classes():
    parts = splits.partition("shards", PAPER, TRAIN, 4, 1)
    assert [len(set(PAPER[p])) for p in parts] == [2] * 4  # where nothing else is said
    for clients, k in ((4, 2), (2, 2), (7, 3), (4, 4)):
        parts = splits.partition("shards", PAPER, TRAIN, clients, 1, classes_per_client=k)
        assert [len(set(PAPER[p])) for p in parts] == [k] * clients
    for clients, k in ((1, 2), (1, 3), (4, 5)):
        with pytest.raises(InputError):
            splits.partition("shards", PAPER, TRAIN, clients, 1, classes_per_client=k)


def test_impossible_partitions_end_with_a_clear_error():
    few = np.arange(12)
    with pytest.raises(InputError, match="13 clients"):
        splits.partition("iid", PAPER, few, 13, 42)
    lone = np.array([0] * 30 + [1] * 30 + [2])  # one image cannot serve two owners
    with pytest.raises(InputError, match="a class has fewer images than owners"):
        splits.partition("shards", lone, np.arange(61), 6, 42, classes_per_client=2)
    with pytest.raises(InputError, match="leaves a blocked fold without validation"):
        splits.make_folds("blocked", np.arange(128) % 2, 2, 42, paths=[f"{i}" for i in range(128)])
    with pytest.raises(InputError, match="without an empty one in 1000 draws"):
        splits.partition("dirichlet", PAPER, few, 12, 42, alpha=0.01)


def test_validation_is_dealt_like_training():
    labels = np.repeat([0, 1], 100)
    clients = [np.arange(0, 60), np.concatenate([np.arange(60, 80), np.arange(100, 150)])]
    val = np.concatenate([np.arange(80, 100), np.arange(180, 200)])
    images = Images(None, torch.from_numpy(labels), [], ["a", "b"], [], "x")
    parts = deal_part(argparse.Namespace(partition="iid", split_seed=0), images, val, clients)
    assert np.array_equal(np.sort(np.concatenate(parts)), val)
    assert [np.bincount(labels[p], minlength=2).tolist() for p in parts] == [[15, 0], [5, 20]]
    again = splits.deal(labels, val, np.array([[60, 20], [0, 50]]), np.random.default_rng([0, 99]))
    assert list(map(list, again)) == list(map(list, parts))  # by random numbers of its own


def partitions():
    """Every split and partition of a small set, as text."""
    y, every, groups = np.arange(90) % 3, np.arange(90), [f"g{i % 40}" for i in range(90)]
    parts = [splits.make_split(kind, y, 1, groups=groups)["test"] for kind in splits.SPLITS[:4]]
    parts += [splits.partition(kind, y, every, 3, 1) for kind in splits.PARTITIONS]
    return repr([np.concatenate(p).tolist() if isinstance(p, list) else p.tolist() for p in parts])


def test_nothing_depends_on_hash_order():
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    code = ("import sys; sys.path[:0] = ['tests', '.']\n"
            "import test_splits; print(test_splits.partitions())")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          cwd=ROOT,
                          env={**os.environ, "PYTHONHASHSEED": seed})
    assert done.stdout.strip() == partitions() and len(done.stdout) > 1000


# ---- k-fold -------------------------------------------------------------------------------------

GROUPS = [f"g{i // 3}" for i in range(len(PAPER))]


def folds(kind, inner_val=0.1, k=5, seed=42):
    return splits.make_folds(kind, PAPER, k, seed, inner_val=inner_val, paths=PATHS, groups=GROUPS)


@pytest.mark.parametrize("inner_val", [0, 0.1])
@pytest.mark.parametrize("kind", splits.FOLDS)
def test_folds_are_disjoint_and_cover_and_inner_validation_never_meets_the_test(kind, inner_val):
    made = folds(kind, inner_val)
    tests = np.concatenate([f["test"] for f in made])
    assert sorted(tests.tolist()) == list(range(len(PAPER)))
    for fold in made:
        train, val, test = (set(fold[p].tolist()) for p in ("train", "val", "test"))
        assert not train & val and not train & test and not val & test
        assert (len(val) > 0) == (inner_val > 0)
        if kind != "blocked":
            assert len(train) + len(val) + len(test) == len(PAPER)
            assert len(val) == pytest.approx(inner_val * (len(train) + len(val)), abs=4)
        for part in fold.values():
            assert part.dtype == np.int64 and np.array_equal(part, np.sort(part))
    assert {len(f["test"]) for f in made} <= {650, 651, 652, 653}


def test_stratified_folds_keep_the_shares_of_every_class():
    for fold in folds("stratified"):
        assert np.ptp([np.array(counts(fold[p])) / len(fold[p]) for p in fold], axis=0).max() < 0.01
    sizes = np.array([counts(fold["test"]) for fold in folds("stratified")])
    assert np.ptp(sizes, axis=0).max() <= 1


def test_grouped_folds_cut_no_group():
    for fold in folds("grouped"):
        owners = [{GROUPS[i] for i in part.tolist()} for part in fold.values()]
        assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
        shares = np.array(counts(fold["test"])) / len(fold["test"])
        assert abs(shares - np.array([504, 985, 963, 804]) / 3256).max() < 0.01


def test_blocked_folds_are_consecutive_numbers_kept_30_files_apart():
    for k, fold in enumerate(folds("blocked")):
        for c, n in enumerate((504, 985, 963, 804)):
            number = {p: [splits.file_number(PATHS[i])[0][0] - 1 for i in part.tolist()
                          if PAPER[i] == c] for p, part in fold.items()}
            assert number["test"] == list(range(round(k * n / 5), round((k + 1) * n / 5)))
            gap = [min(abs(a - b) for b in number["test"]) for a in number["train"] + number["val"]]
            assert min(gap) == splits.EMBARGO + 1
            if k:  # validation precedes the test part, training is 30 files from both
                assert max(number["val"]) == number["test"][0] - splits.EMBARGO - 1
            rotated = [(a - number["test"][0]) % n for a in number["val"]]
            before = [(a - number["test"][0]) % n for a in number["train"]]
            assert min(rotated) - max(before) == splits.EMBARGO + 1


def test_folds_repeat_and_follow_the_seed():
    for kind in ("random", "stratified", "grouped"):
        a, b, c = folds(kind), folds(kind), folds(kind, seed=43)
        assert all(np.array_equal(x[p], y[p]) for x, y in zip(a, b, strict=True) for p in x)
        assert not np.array_equal(a[0]["test"], c[0]["test"])


def test_a_class_may_have_exactly_one_image_a_fold_and_a_tenth_validates_unless_said():
    y = np.array([0] * 5 + [1] * 45)
    made = splits.make_folds("stratified", y, 5, 0)
    assert [np.bincount(y[f["test"]]).tolist() for f in made] == [[1, 9]] * 5
    assert [len(f["val"]) for f in made] == [4] * 5  # of 40


def test_impossible_folds_are_refused():
    y = np.array([0] * 40 + [1] * 4)
    with pytest.raises(InputError, match="5 folds are more than the 4 images of class number 1"):
        splits.make_folds("stratified", y, 5, 0)
    with pytest.raises(InputError, match="more than the 2 groups of class number 1"):
        splits.make_folds("grouped", y, 3, 0, groups=[str(i // 2) for i in range(44)])
    with pytest.raises(InputError, match="too few for 3 blocked folds"):
        splits.make_folds("blocked", np.zeros(99, int), 3, 0, paths=[f"{i}.png" for i in range(99)])
    with pytest.raises(InputError, match="stratified80 knows no folds"):
        splits.make_folds("stratified80", y, 2, 0)
    with pytest.raises(InputError, match="--inner-val 0.001 leaves a fold .*: no group is so"):
        splits.make_folds("grouped", y, 2, 0, inner_val=0.001, groups=list(map(str, range(44))))


def test_what_differs_between_classes_is_no_stain_however_much_it_differs():
    """Within each class the first statistic rises, and the second says nothing of the first."""
    labels, rising = np.repeat([0, 1], 4), np.tile(np.arange(4), 2)
    colour = np.stack([rising, 10 * labels + np.tile([1, 0, 0, 1], 2)], 1)
    owner = splits.stain_owners(colour, labels, list("abcdefgh"), np.arange(8), 2)
    assert owner.tolist() == [0, 0, 1, 1] * 2


def test_statistics_of_any_scale_count_alike_in_the_stain():
    rng = np.random.default_rng(0)
    stain, labels = rng.permutation(40) / 40, np.arange(40) % 2
    x = np.stack([stain + 0.02 * rng.normal(size=40) for _ in range(4)]
                 + [rng.normal(size=40)], 1)
    paths = [f"{i:02d}" for i in range(40)]
    plain = splits.stain_owners(x, labels, paths, np.arange(40), 2)
    assert np.corrcoef(plain, stain)[0, 1] > 0.7
    scaled = splits.stain_owners(x * (1, 1, 1, 1, 1000), labels, paths, np.arange(40), 2)
    assert np.array_equal(plain, scaled)
    # what tells the classes apart is taken off, however many statistics say it
    told = np.concatenate([x, labels[:, None] + 0.01 * rng.normal(size=(40, 12))], 1)
    assert np.corrcoef(splits.stain_owners(told, labels, paths, np.arange(40), 2),
                       stain)[0, 1] > 0.7
