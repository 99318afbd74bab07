"""Metrics against the paper's own confusion matrix, scikit-learn, and hand-built cases."""

import json

import numpy as np
import pytest
from helpers import toy_images
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk

from dataset.images import colour_statistics
from reporting import baselines, metrics

NAMES = ["Benign", "Early", "Pre", "Pro"]
PAPER = np.array([[58, 0, 1, 0], [1, 97, 0, 0], [0, 0, 84, 0], [0, 0, 0, 84]])  # section V


def expand(confusion):
    true = np.repeat(np.repeat(np.arange(4), 4), confusion.ravel())
    predicted = np.repeat(np.tile(np.arange(4), 4), confusion.ravel())
    return true, predicted


def noisy(n=400, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    return rng.normal(size=(n, 4)) + 1.5 * np.eye(4)[labels], labels


def test_the_only_confusion_matrix_that_fits_the_paper():
    labels, predicted = expand(PAPER)
    m = metrics.measure(8 * np.eye(4)[predicted], labels, NAMES)
    assert m["confusion"] == PAPER.tolist() and m["n"] == 325
    assert m["accuracy"]["value"] == 323 / 325
    assert round(m["accuracy"]["low"], 4) == 0.9778 and round(m["accuracy"]["high"], 4) == 0.9983
    assert round(m["macro_f1"], 4) == 0.9930 and round(m["kappa"], 4) == 0.9917
    assert [round(m[f"weighted_{k}"], 4) for k in ("precision", "recall", "f1")] == [
        0.9939, 0.9938, 0.9938]
    table = {name: tuple(round(m["per_class"][name][k], 4) for k in ("precision", "recall", "f1"))
             for name in NAMES}
    assert table == {"Benign": (0.9831,) * 3, "Early": (1.0, 0.9898, 0.9949),
                     "Pre": (0.9882, 1.0, 0.9941), "Pro": (1.0, 1.0, 1.0)}
    assert m["malignant"]["sensitivity"]["value"] == 265 / 266
    assert m["malignant"]["specificity"]["value"] == 58 / 59
    assert m["per_class"]["Pre"]["specificity"] == 240 / 241


@pytest.mark.parametrize("k,n,low,high", [(323, 325, 0.9778, 0.9983), (641, 652, 0.9700, 0.9906),
                                          (635, 652, 0.9586, 0.9837), (628, 652, 0.9458, 0.9751)])
def test_wilson_intervals(k, n, low, high):
    interval = metrics.wilson(k, n)
    assert (round(interval["low"], 4), round(interval["high"], 4)) == (low, high)
    z = 1.959963984540054  # the formula, by hand
    centre = (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    assert interval["low"] == pytest.approx(centre - half, abs=1e-12)
    assert interval["high"] == pytest.approx(centre + half, abs=1e-12)
    assert interval["value"] == k / n


def test_everything_agrees_with_scikit_learn():
    logits, labels = noisy()
    p, predicted = softmax(logits, 1), logits.argmax(1)
    m = metrics.measure(logits, labels, NAMES)
    for kind in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(labels, predicted, average=kind)[:3]
        for key, value in zip(("precision", "recall", "f1"), expected, strict=True):
            assert m[f"{kind}_{key}"] == pytest.approx(value, abs=1e-12)
    assert m["kappa"] == pytest.approx(sk.cohen_kappa_score(labels, predicted), abs=1e-12)
    assert m["roc_auc"] == pytest.approx(
        sk.roc_auc_score(labels, p, multi_class="ovr", average="macro"), abs=1e-12)
    assert m["loss"] == pytest.approx(sk.log_loss(labels, p), abs=1e-9)
    assert m["accuracy"]["value"] == sk.accuracy_score(labels, predicted)
    assert m["brier"] == pytest.approx(((p - np.eye(4)[labels]) ** 2).sum(1).mean(), abs=1e-12)
    assert m["confusion"] == sk.confusion_matrix(labels, predicted).tolist()


def test_loss_does_not_underflow():
    m = metrics.measure(np.array([[0.0, 500.0], [0.0, 0.0]]), np.array([0, 1]), ["a", "b"])
    assert m["loss"] == pytest.approx((500 + np.log(2)) / 2)


def test_pooled_differs_from_the_mean_over_clients():
    """Two clients of different difficulty: the pooled figures are the reported ones."""
    logits, labels = noisy(300)
    easy = logits.copy()
    easy[:60] = 9 * np.eye(4)[labels[:60]]
    pooled = metrics.measure(easy, labels, NAMES)
    parts = [metrics.measure(easy[s], labels[s], NAMES) for s in (slice(0, 60), slice(60, 300))]
    for key in ("macro_f1", "kappa", "roc_auc"):
        assert abs(np.mean([p[key] for p in parts]) - pooled[key]) > 0.005
    right = sum(p["accuracy"]["value"] * p["n"] for p in parts)
    assert right == pytest.approx(pooled["accuracy"]["value"] * 300)


def test_absent_class_gives_null_never_a_crash_or_a_zero():
    logits, labels = noisy(100)
    keep = labels != 3
    logits, labels = logits[keep].copy(), labels[keep]
    logits[:, 2] -= 50  # and Pre is never predicted
    logits[:10] = 9 * np.eye(4)[3]  # but the absent Pro is
    m = metrics.measure(logits, labels, NAMES)
    pro, pre = m["per_class"]["Pro"], m["per_class"]["Pre"]
    assert pro["recall"] is None and pro["f1"] is None and pro["auc"] is None
    assert pro["precision"] == 0.0 and pro["support"] == 0 and pro["specificity"] < 1
    assert pre["precision"] is None and pre["recall"] == 0.0 and pre["f1"] == 0.0
    present = [0, 1, 2]
    predicted = logits.argmax(1)
    assert m["macro_f1"] == pytest.approx(
        sk.f1_score(labels, predicted, labels=present, average="macro"), abs=1e-12)
    aucs = [sk.roc_auc_score(labels == c, softmax(logits, 1)[:, c]) for c in present]
    assert m["roc_auc"] == pytest.approx(np.mean(aucs), abs=1e-12)
    json.dumps(m, allow_nan=False)


def test_one_class_only_and_one_image():
    m = metrics.measure(np.array([[2.0, 0.0]] * 5), np.zeros(5, int), ["Benign", "Early"])
    assert m["kappa"] is None and m["roc_auc"] is None
    assert m["malignant"]["sensitivity"] == {"value": None, "low": None, "high": None}
    assert m["intervals"]["roc_auc"] == {"low": None, "high": None}
    json.dumps(m, allow_nan=False)
    json.dumps(metrics.measure(np.array([[2.0, 0.0]]), np.array([1]), ["a", "b"]), allow_nan=False)
    assert metrics.measure(np.array([[2.0, 0.0]]), np.array([1]), ["a", "b"])["malignant"] is None


def test_a_class_of_a_single_image_has_an_auc():
    logits = np.log(np.array([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.5, 0.35, 0.15], [0.2, 0, 0.8]])
                    + 1e-9)
    m = metrics.measure(logits, np.array([0, 0, 1, 2]), ["a", "b", "c"])
    assert [m["per_class"][name]["auc"] for name in "abc"] == pytest.approx(
        [3.5 / 4, 2 / 3, 1])  # a tie is a half
    assert m["roc_auc"] == pytest.approx((3.5 / 4 + 2 / 3 + 1) / 3)


def test_malignant_against_benign_by_patient_counts_malignant_images_called_benign():
    """Two of three malignant images are found, though one of them as the wrong kind; one of two
    benign ones is called malignant."""
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 2, 0, 2])
    members = np.array([4, 5, 4, 6, 7])
    found = metrics.by_unit(labels, np.eye(3)[predicted], members, "patient",
                            ["Benign", "Early", "Pre"])
    assert found["n"] == 4 and found["reason"].startswith("no interval: 3 of 4 patients hold")
    assert found["accuracy"] == metrics.clustered(np.array([1, 0, 0, 0, 1], bool), members)
    assert found["malignant"] == {
        "sensitivity": metrics.clustered(np.array([1, 0, 1], bool), members[2:]),
        "specificity": metrics.clustered(np.array([1, 0], bool), members[:2])}
    assert [x["value"] for x in found["malignant"].values()] == [2 / 3, 1 / 2]
    assert metrics.by_unit(labels, np.eye(3)[predicted], members, "patient", list("abc"))[
        "malignant"] is None


def test_non_finite_logits_give_null_not_a_crash():
    m = metrics.measure(np.full((6, 2), np.nan), np.arange(6) % 2, ["a", "b"])
    assert m["loss"] is None and m["roc_auc"] is None and m["brier"] is None
    json.dumps(m, allow_nan=False)


def test_calibration_error_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    labels = np.array([0, 1, 0])
    assert metrics.calibration_error(p, labels) == pytest.approx((abs(1 - 1.8) + 0.4) / 3)
    assert metrics.calibration_error(np.eye(2), np.array([1, 0])) == 1  # sure, and wrong


@pytest.mark.parametrize(("confidence", "right", "error"), [
    ((0.67, 0.73), (0, 1), abs(1 - 1.4)),  # both between 10/15 and 11/15: they cancel
    ((0.73, 0.74), (0, 1), 0.73 + 0.26), ((0.66, 0.67), (0, 1), 0.66 + 0.33),  # at both edges
    ((0.92, 0.95), (0, 1), 0.92 + 0.05),  # the last begins at 14/15
    ((0.95, 1.0), (0, 1), abs(1 - 1.95))])  # and has its upper edge
def test_calibration_is_judged_in_fifteen_bins_of_equal_width(confidence, right, error):
    p = np.array([[c, 1 - c] for c in confidence])
    assert metrics.calibration_error(p, 1 - np.array(right)) == pytest.approx(error / 2)


def test_resampled_auc_equals_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.4
    counts = rng.multinomial(60, np.full(60, 1 / 60), 20)
    ours = metrics.resampled_auc(counts, positive, score)
    for row, value in zip(counts, ours, strict=True):
        index = np.repeat(np.arange(60), row)
        assert value == pytest.approx(sk.roc_auc_score(positive[index], score[index]), abs=1e-12)


def test_bootstrap_intervals_repeat_hold_the_value_and_match_a_plain_loop(monkeypatch):
    logits, labels = noisy(200)
    p, predicted = softmax(logits, 1), logits.argmax(1)
    m = metrics.measure(logits, labels, NAMES)
    assert m["intervals"] == metrics.measure(logits, labels, NAMES)["intervals"]
    for key in ("macro_f1", "kappa", "roc_auc"):
        assert m["intervals"][key]["low"] < m[key] < m["intervals"][key]["high"]
    counts = np.random.default_rng(0).multinomial(200, np.full(200, 1 / 200), metrics.BOOTSTRAP)
    plain = {"macro_f1": [], "kappa": [], "roc_auc": []}
    for row in counts[:200]:
        i = np.repeat(np.arange(200), row)
        plain["macro_f1"].append(sk.f1_score(labels[i], predicted[i], average="macro"))
        plain["kappa"].append(sk.cohen_kappa_score(labels[i], predicted[i]))
        plain["roc_auc"].append(sk.roc_auc_score(labels[i], p[i], multi_class="ovr"))
    monkeypatch.setattr(metrics, "BOOTSTRAP", 200)
    short = metrics.bootstrap(labels, predicted, p, p.shape[1])
    fresh = np.random.default_rng(0).multinomial(200, np.full(200, 1 / 200), 200)
    assert np.array_equal(fresh, counts[:200])
    for key, values in plain.items():
        low, high = np.percentile(values, (2.5, 97.5))
        assert short[key]["low"] == pytest.approx(low, abs=1e-9)
        assert short[key]["high"] == pytest.approx(high, abs=1e-9)


def test_percentiles_leave_out_one_in_forty_on_either_side_and_what_is_undefined():
    values = np.append(np.arange(1001.0), [np.nan, np.inf])
    assert metrics.percentiles(values) == {"low": 25, "high": 975}  # 2.5 % on each side
    assert metrics.percentiles(np.array([0.5])) == {"low": 0.5, "high": 0.5}
    assert metrics.percentiles(np.array([np.nan])) == {"low": None, "high": None}


def test_an_interval_without_width_is_none():
    """A network that answers one class: κ is 0 in every resample."""
    labels = np.arange(60) % 2
    found = metrics.measure(np.tile([1.0, 0.0], (60, 1)), labels, ["a", "b"])["intervals"]
    assert found["kappa"] == found["roc_auc"] == {"low": None, "high": None}
    assert found["macro_f1"]["low"] < 1 / 3 < found["macro_f1"]["high"]


def test_counts_alone_give_all_figures_but_those_of_probabilities():
    labels, predicted = expand(np.array([[9, 2, 1, 0], [3, 8, 0, 2], [1, 1, 9, 0], [0, 2, 0, 7]]))
    confusion = metrics.confusion_matrix(labels, predicted)
    found = metrics.measure_counts(confusion, 90.0, NAMES)
    whole = metrics.measure(9.0 * np.eye(4)[predicted], labels, NAMES)
    assert (found["n"], found["loss"]) == (45, 2.0)
    unknown = {"ece": None, "brier": None, "roc_auc": None, "loss": 2.0}
    for name in NAMES:
        whole["per_class"][name]["auc"] = None
    whole["intervals"]["roc_auc"] = {"low": None, "high": None}
    for key in ("macro_f1", "kappa"):
        a, b = (m["intervals"].pop(key) for m in (found, whole))
        assert b["low"] < whole[key] < b["high"] and a["low"] < found[key] < a["high"]
    assert found == whole | unknown


def test_a_resample_counts_whole_patients_and_the_classes_that_it_has():
    """A thousand resamples of 40 patients of one to four images; one image of the third class,
    which is also predicted for another: it is absent from many."""
    members = np.repeat(np.arange(40), np.arange(40) % 4 + 1)
    labels, rng = np.arange(100) % 2, np.random.default_rng(1)
    predicted = np.where(rng.random(100) < 0.7, labels, 1 - labels)
    labels[50] = predicted[50] = predicted[7] = 2
    p = 0.7 * np.eye(3)[predicted] + 0.1 * (1 + rng.random((100, 1)))
    counts = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 1000)[:, members]
    f1, kappa = [], []
    for row in counts:
        confusion = np.bincount(3 * labels + predicted, row, 9).reshape(3, 3)
        rows, columns, n = confusion.sum(1), confusion.sum(0), row.sum()
        present = rows > 0
        f1.append((2 * np.diag(confusion) / np.maximum(rows + columns, 1))[present].mean())
        chance = rows @ columns / n**2
        kappa.append((np.trace(confusion) / n - chance) / (1 - chance))
    auc = np.nanmean([metrics.resampled_auc(counts, labels == c, p[:, c]) for c in range(3)], 0)
    assert (counts[:, 50] == 0).any() and counts[:, 50].any()
    found = metrics.bootstrap(labels, predicted, p, 3, members, "patient")
    assert found["reason"] is None
    for key, values in (("macro_f1", f1), ("kappa", kappa), ("roc_auc", auc)):
        assert list(found[key].values()) == pytest.approx(np.percentile(values, (2.5, 97.5)))


def test_log_softmax_is_the_one_used():
    logits, labels = noisy(50)
    expected = -log_softmax(logits, 1)[np.arange(50), labels].mean()
    assert metrics.measure(logits, labels, NAMES)["loss"] == pytest.approx(expected, abs=1e-12)


def test_mcnemar_is_the_exact_binomial():
    a = np.array([True] * 9 + [False] * 1 + [True] * 20)
    b = np.array([False] * 9 + [True] * 1 + [True] * 20)
    m = metrics.mcnemar(a, b)
    # two-sided: 2·(C(10,0) + C(10,1)) / 2^10
    assert m == {"a_only": 9, "b_only": 1, "p": pytest.approx(2 * 11 / 1024)}
    assert metrics.mcnemar(b, a)["p"] == m["p"]
    assert metrics.mcnemar(a, a) == {"a_only": 0, "b_only": 0, "p": 1.0}


def test_paired_difference_is_that_of_resampled_pairs():
    rng = np.random.default_rng(1)
    runs = (rng.random((2, 80)) < 0.9).mean(0)  # two seeds against one: shares, not 0 and 1
    b = rng.random(80) < 0.7
    d = metrics.paired_difference(runs, b)
    assert d["value"] == pytest.approx(runs.mean() - b.mean()) and d["reason"] is None
    drawn = rng.integers(0, 80, (20000, 80))  # the plain bootstrap
    low, high = np.percentile(runs[drawn].mean(1) - b[drawn].mean(1), (2.5, 97.5))
    assert d["low"] == pytest.approx(low, abs=0.013) and d["high"] == pytest.approx(high, abs=0.013)
    nothing = metrics.paired_difference(runs, runs)  # never an interval without width
    assert (nothing["low"], nothing["high"]) == (None, None)
    assert nothing["reason"] == ("no interval: 0 of 80 images hold a discordant image; a bootstrap "
                                 "needs 10 of at least 30")


def test_a_difference_by_patient_is_the_bootstrap_over_ten_thousand_draws_of_them():
    """Patients of one to four images; the mean is over the images that were drawn."""
    members = np.repeat(np.arange(40), np.arange(40) % 4 + 1)
    a, b = np.arange(100) % 4 > 0, np.arange(100) % 3 > 0
    counts = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 10_000)[:, members]
    low, high = np.percentile(counts @ (a * 1.0 - b) / counts.sum(1), (2.5, 97.5))
    d = metrics.paired_difference(a, b, members, "patient")
    assert d["value"] == pytest.approx(0.75 - 0.66) and d["reason"] is None
    assert (d["low"], d["high"]) == pytest.approx((low, high))
    other = metrics.paired_difference(a, b, members, "patient", seed=1)
    assert other["value"] == d["value"] and other["low"] != d["low"]
    for discordant, reason in ((10, False), (9, True)):
        c = a.copy()
        c[np.flatnonzero(np.diff(members, prepend=-1))[:discordant]] ^= True  # an image of each
        assert (metrics.paired_difference(a, c, members, "x")["reason"] is not None) == reason


def test_newcombe_without_correlation_adds_the_squares():
    """No correlation where the product less the correction of continuity is nothing, and where
    one of the two is always right or never."""
    for both, a_only, b_only, neither in ((4, 1, 1, 1), (1, 0, 0, 1), (0, 5, 0, 0), (3, 4, 0, 0)):
        n = both + a_only + b_only + neither
        one, two = metrics.wilson(both + a_only, n), metrics.wilson(both + b_only, n)
        d = metrics.newcombe(both, a_only, b_only, neither)
        assert d["reason"] is None and d["value"] == (a_only - b_only) / n
        assert d["low"] == pytest.approx(d["value"] - np.hypot(
            one["value"] - one["low"], two["high"] - two["value"]))
        assert d["high"] == pytest.approx(d["value"] + np.hypot(
            one["high"] - one["value"], two["value"] - two["low"]))


def test_newcombe_gives_the_published_interval_and_has_a_width():
    """Newcombe 1998, table II: the pairs 36, 12, 2, 0 (method 10: 0.0569 to 0.3404)."""
    d = metrics.newcombe(36, 12, 2, 0)
    assert (d["value"], d["low"], d["high"]) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    d = metrics.newcombe(320, 1, 0, 4)
    assert (round(d["low"], 4), round(d["high"], 4)) == (-0.0102, 0.0181)
    d = metrics.newcombe(0, 1, 0, 324)
    assert d["low"] < 0 < d["high"]
    d = metrics.newcombe(325, 0, 0, 0)
    assert d["value"] == 0 and d["low"] == -d["high"] < 0
    one, two = np.array([True] * 8 + [False] * 2), np.array([True] * 7 + [False, True, False])
    assert metrics.paired_difference(one, two) == metrics.newcombe(7, 1, 1, 1)
    swapped = metrics.newcombe(7, 3, 1, 1), metrics.newcombe(7, 1, 3, 1)
    assert swapped[0]["low"] == pytest.approx(-swapped[1]["high"])


def test_mean_and_sample_standard_deviation():
    m = metrics.mean_sd([0.9, None, {"value": 0.8, "low": 0, "high": 1}, 0.7])
    assert m == {"n": 3, "mean": pytest.approx(0.8), "sd": pytest.approx(0.1)}
    assert metrics.mean_sd([0.5, 0.7])["sd"] == pytest.approx(0.2 / 2**0.5)
    assert metrics.mean_sd([0.5]) == {"n": 1, "mean": 0.5, "sd": None}
    assert metrics.mean_sd([None]) == {"n": 0, "mean": None, "sd": None}


class Constant:
    """A classifier that says 0, and notes what it was fitted on."""

    def __init__(self, fitted):
        self.fitted = fitted

    def fit(self, x, y):
        self.fitted.append((x.ravel().tolist(), y.tolist()))
        return self

    def predict(self, x):
        return np.zeros(len(x), int)


def test_colour_is_fitted_on_the_training_part_or_on_a_sample_of_ten_thousand(monkeypatch, capsys):
    images, fitted = toy_images(10_004, classes=2, size=1), []
    features = {("means", "cut"): np.arange(10_004.0)[:, None]}
    monkeypatch.setattr(baselines, "colour_features", lambda images: features)
    monkeypatch.setattr(baselines, "make_classifier", lambda kind: Constant(fitted))
    split = {"val": np.array([0, 2, 3]), "test": np.array([], int), "train": np.arange(10_000) + 4}
    one, svm = baselines.colour_only(images, split)
    assert one == {"features": "means", "strip": "cut", "classifier": "1-nn", "fitted_on": 10_000,
                   "val": metrics.wilson(2, 3), "test": metrics.wilson(0, 0)}
    assert svm == one | {"classifier": "rbf-svm"} and capsys.readouterr().err == ""
    assert fitted[0] == (split["train"].tolist(), [0, 1] * 5000)
    split = {"val": np.array([1]), "test": np.array([0]), "train": np.arange(10_001) + 3}
    rows = baselines.colour_only(images, split)
    assert [row["fitted_on"] for row in rows] == [10_000] * 2
    assert [row["val"]["value"] for row in rows] == [0] * 2
    assert capsys.readouterr().err == ("note: colour alone is fitted on a sample, 10000 of 10001 "
                                       "training images\n")
    first, second = (x for x, _ in fitted[2:])
    assert first == second == sorted(set(first)) and len(first) == 10_000
    drawn = np.random.default_rng(0).choice(split["train"], 10_000, replace=False)
    assert set(first) == set(drawn.tolist()) <= set(split["train"].tolist())


def test_the_features_of_colour_are_told_apart_by_kind_and_strip():
    images = toy_images(6, size=10)
    found = baselines.colour_features(images)
    assert set(found) == {("means", "included"), ("statistics", "included"), ("statistics", "cut")}
    for (kind, strip), x in found.items():
        assert np.array_equal(x, colour_statistics(images.array(), kind, strip == "cut"))
    assert not np.array_equal(found["statistics", "included"], found["statistics", "cut"])


def test_the_classifiers_of_colour_are_what_they_are_called():
    """One neighbour; an SVM of C = 10 and gamma "scale"; both on standardised features."""
    one, svm = baselines.make_classifier("1-nn"), baselines.make_classifier("rbf-svm")
    assert type(one[0]).__name__ == type(svm[0]).__name__ == "StandardScaler"
    assert one[-1].n_neighbors == 1
    assert (svm[-1].C, svm[-1].gamma, svm[-1].kernel) == (10, "scale", "rbf")
    assert [type(baselines.make_classifier(kind)[-1]).__name__ for kind in ("1-nn", "rbf-svm")] == [
        "KNeighborsClassifier", "SVC"]
