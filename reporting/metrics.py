"""Predictions → numbers with intervals. Always from pooled predictions, never means of means.

Undefined figures (a class absent from the split, a class never predicted) are None, not zero.
Intervals are 95 %. Those of images assume independent images; images of one patient are not, so
where patients (or groups) are known, a second set of intervals counts these.
"""

import numpy as np
from scipy.special import log_softmax
from scipy.stats import beta, binomtest, t
from sklearn.metrics import confusion_matrix, roc_auc_score

from dataset.files import CLASSES

BOOTSTRAP = 1000  # resamples of the percentile intervals
LEAST, LEAST_WRONG = 30, 10  # units, and units with an error, that a bootstrap needs
BINS = 15  # of the expected calibration error
FIGURES = ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1", "weighted_precision",
           "weighted_recall", "weighted_f1", "kappa", "roc_auc")  # one number each, of `measure`


def measure(logits: np.ndarray, labels: np.ndarray, classes: list[str],
            units: dict[str, np.ndarray] | None = None) -> dict:
    """Every figure of one part of the data, as `results.json` has them (docs/run-folder.md).
    logits: float [n, C]; labels: int [n]. `loss` is the unweighted, unsmoothed cross-entropy. Macro
    figures are means over the classes present; there an undefined precision counts as 0, as in
    scikit-learn. `brier` is the sum over classes (0..2), `roc_auc` macro one-against-rest.
    units: "patient" or "group" → whose each image is, int [n]: adds `by_patient`, `by_group`."""
    logits = np.asarray(logits, dtype=np.float64)
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    loss = -log_p[np.arange(len(labels)), labels].mean()
    figures = _measure(labels, logits.argmax(1), p, loss, classes)
    figures["ece"] = calibration_error(p, labels)
    figures["brier"] = _finite(((p - np.eye(len(classes))[labels]) ** 2).sum(1).mean())
    for name, members in (units or {}).items():
        figures[f"by_{name}"] = by_unit(labels, p, members, name, classes)
    return figures


def by_unit(labels: np.ndarray, p: np.ndarray, members: np.ndarray, name: str,
            classes: list[str]) -> dict:
    """Intervals that hold for new patients (or groups): images of one are alike, and what fails is
    a patient. labels, members: int [n]; p: float [n, C]."""
    predicted = p.argmax(1)
    hit = predicted == labels
    out = {"n": len(np.unique(members)), "accuracy": clustered(hit, members),
           **bootstrap(labels, predicted, p, len(classes), members, name), "malignant": None}
    if is_binary(classes):
        benign = labels == classes.index("Benign")
        right = (predicted == classes.index("Benign")) == benign
        out["malignant"] = {"sensitivity": clustered(right[~benign], members[~benign]),
                            "specificity": clustered(right[benign], members[benign])}
    return out


def clustered(hit: np.ndarray, members: np.ndarray) -> dict:
    """A proportion over images that come in clusters, with the interval of Korn and Graubard (1998,
    Survey Methodology 24:193): Clopper and Pearson's, on an effective number of images, which is
    n / design effect · (t(n-1) / t(clusters-1))², at most n. While fewer than ten clusters hold an
    error, or fewer than ten a hit, it is n² / Σ (size of a cluster)²: their number, where they are
    equal. Both are too narrow where one cluster dominates. hit: bool [n]; members: int [n]."""
    n = len(hit)
    if n == 0:
        return {"value": None, "low": None, "high": None, "effective_n": None}
    cluster = np.unique(members, return_inverse=True)[1]
    hits, sizes = np.bincount(cluster, hit.astype(float)), np.bincount(cluster)
    k, share = len(sizes), float(hit.mean())
    if min((hits < sizes).sum(), (hits > 0).sum()) < LEAST_WRONG:
        effective = n**2 / (sizes**2).sum()
    else:
        variance = k / (k - 1) * ((hits - share * sizes) ** 2).sum() / n**2
        with np.errstate(divide="ignore"):  # all shares are equal: as many as there are images
            effective = share * (1 - share) / variance
        effective *= (t.ppf(0.975, n - 1) / t.ppf(0.975, k - 1))**2
    effective = float(min(effective, n))
    x = share * effective
    return {"value": share, "low": float(beta.ppf(0.025, x, effective - x + 1)) if x > 0 else 0.0,
            "high": float(beta.ppf(0.975, x + 1, effective - x)) if x < effective else 1.0,
            "effective_n": effective}


def measure_counts(confusion: np.ndarray, loss_sum: float, classes: list[str]) -> dict:
    """The same figures from a confusion matrix [true, predicted] and a sum of losses, which is all
    that a hospital sends. Figures that need the probabilities (AUC, calibration) are None."""
    cells = np.indices(confusion.shape).reshape(2, -1).repeat(confusion.ravel(), axis=1)
    figures = _measure(*cells, None, loss_sum / confusion.sum(), classes)
    return figures | {"ece": None, "brier": None}


def _measure(labels: np.ndarray, predicted: np.ndarray, p: np.ndarray | None, loss: float,
             classes: list[str]) -> dict:
    n = len(labels)
    confusion = confusion_matrix(labels, predicted, labels=range(len(classes)))
    per_class = per_class_metrics(confusion, p, labels, classes)
    present = np.flatnonzero(confusion.sum(1))
    support = confusion.sum(1)[present]
    figures = {"n": n, "loss": _finite(loss), "accuracy": wilson(int(np.trace(confusion)), n)}
    for kind, weights in (("macro", np.ones(len(present))), ("weighted", support)):
        for key in ("precision", "recall", "f1"):
            values = [per_class[classes[c]][key] or 0.0 for c in present]
            figures[f"{kind}_{key}"] = float(np.average(values, weights=weights))
    chance = (confusion.sum(0) * confusion.sum(1)).sum() / n**2
    agreement = np.trace(confusion) / n
    figures["kappa"] = float((agreement - chance) / (1 - chance)) if chance < 1 else None
    aucs = [per_class[name]["auc"] for name in classes if per_class[name]["auc"] is not None]
    figures["roc_auc"] = float(np.mean(aucs)) if aucs else None
    return figures | {"intervals": bootstrap(labels, predicted, p, len(classes)),
                      "confusion": confusion.tolist(), "per_class": per_class,
                      "malignant": malignant(confusion, classes)}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def wilson(successes: int, n: int) -> dict:
    """A proportion with its Wilson 95 % score interval; all None where n is 0."""
    if n == 0:
        return {"value": None, "low": None, "high": None}
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return {"value": successes / n, "low": float(interval.low), "high": float(interval.high)}


def per_class_metrics(confusion: np.ndarray, p: np.ndarray | None, labels: np.ndarray,
                      classes: list[str]) -> dict:
    """Precision, recall, specificity, F1, AUC (one against rest) and support by class name."""
    def ratio(a: int, b: int) -> float | None:
        return float(a / b) if b else None
    out = {}
    for c, name in enumerate(classes):
        hit, row, column = confusion[c, c], confusion[c].sum(), confusion[:, c].sum()
        negatives = confusion.sum() - row
        defined = 0 < row < confusion.sum() and p is not None and np.isfinite(p).all()
        out[name] = {
            "precision": ratio(hit, column), "recall": ratio(hit, row),
            "specificity": ratio(negatives - (column - hit), negatives),
            "f1": ratio(2 * hit, row + column) if row else None,
            "auc": float(roc_auc_score(labels == c, p[:, c])) if defined else None,
            "support": int(row)}
    return out


def malignant(confusion: np.ndarray, classes: list[str]) -> dict | None:
    """Malignant (all but Benign) against Benign, Wilson intervals. None unless the classes are
    those of the ALL set, or Benign and Malignant: elsewhere what is not benign may be normal."""
    if not is_binary(classes):
        return None
    b = classes.index("Benign")
    benign, rest = confusion[b].sum(), confusion.sum() - confusion[b].sum()
    missed = confusion[:, b].sum() - confusion[b, b]  # leukaemias called benign
    return {"sensitivity": wilson(int(rest - missed), int(rest)),
            "specificity": wilson(int(confusion[b, b]), int(benign))}


def is_binary(classes: list[str]) -> bool:
    """Whether all classes but Benign are malignant: those of the ALL set, or Malignant."""
    return "Benign" in classes and set(classes) <= {*CLASSES, "Malignant"}


def calibration_error(p: np.ndarray, labels: np.ndarray) -> float | None:
    """Expected calibration error of the top class, 15 bins of equal width (Guo et al. 2017)."""
    confidence, correct = p.max(1), p.argmax(1) == labels
    bins = np.minimum((np.nan_to_num(confidence) * BINS).astype(int), BINS - 1)
    gaps = [abs(correct[bins == b].sum() - confidence[bins == b].sum()) for b in range(BINS)]
    return _finite(sum(gaps) / len(labels))


def too_few(changed: np.ndarray, members: np.ndarray, name: str, what: str) -> str | None:
    """Why a bootstrap over these units would be too narrow, or None. It needs 30 units, and ten
    that hold an image of `changed`, bool [n] (a wrong one, a discordant one): with none of them
    every resample is the same, and the interval has no width. members: the unit of each, int [n]"""
    k, held = len(np.unique(members)), len(np.unique(members[changed]))
    if k >= LEAST and held >= LEAST_WRONG:
        return None
    return (f"no interval: {held} of {k} {name}s hold {what}; a bootstrap needs {LEAST_WRONG} of "
            f"at least {LEAST}")


def resample(members: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each image is in each resample of whole units: int [resamples, n]."""
    unit = np.unique(members, return_inverse=True)[1]
    k = unit.max() + 1
    return np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), resamples)[:, unit]


def bootstrap(labels: np.ndarray, predicted: np.ndarray, p: np.ndarray | None, num_classes: int,
              members: np.ndarray | None = None, name: str = "image", seed: int = 0) -> dict:
    """Percentile 95 % intervals of macro F1, κ and macro AUC over resampled images, or over whole
    units; None where these are too few, and `reason` says so. Where a resample lacks a class, the
    mean is over the classes that it has. members: the unit of each image, int [n]. Fixed seed."""
    members = np.arange(len(labels)) if members is None else members
    reason = too_few(predicted != labels, members, name, "an error")
    if reason is not None:
        nothing = {"low": None, "high": None}
        return {"macro_f1": nothing, "kappa": nothing, "roc_auc": nothing, "reason": reason}
    counts = resample(members, BOOTSTRAP, seed)
    n = counts.sum(1)  # varies where units have several images
    cells = labels * num_classes + predicted
    matrices = (counts @ np.eye(num_classes**2)[cells]).reshape(-1, num_classes, num_classes)
    rows, columns = matrices.sum(2), matrices.sum(1)
    hits = np.einsum("rcc->rc", matrices)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(rows > 0, 2 * hits / (rows + columns), np.nan)
        chance = (rows * columns).sum(1) / n**2
        kappas = (hits.sum(1) / n - chance) / (1 - chance)
    aucs = np.full((1, 1), np.nan) if p is None else np.stack(
        [resampled_auc(counts, labels == c, p[:, c]) for c in range(num_classes)], 1)
    f1, aucs = (np.ma.masked_invalid(x).mean(1).filled(np.nan) for x in (f1, aucs))
    found = {key: percentiles(values) for key, values in (
        ("macro_f1", f1), ("kappa", kappas), ("roc_auc", aucs))}
    return {key: x if x["low"] != x["high"] else {"low": None, "high": None}  # without width: none
            for key, x in found.items()} | {"reason": None}


def resampled_auc(counts: np.ndarray, positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """AUC per resample, float [R], NaN where undefined; counts: int [R, n]; ties count half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    up = np.add.reduceat(counts[:, order] * positive[order], starts, axis=1)
    down = np.add.reduceat(counts[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(down, 1) - down
    with np.errstate(invalid="ignore"):
        return (up * (below + 0.5 * down)).sum(1) / (up.sum(1) * down.sum(1))


def percentiles(values: np.ndarray) -> dict:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return {"low": None, "high": None}
    low, high = np.percentile(values, (2.5, 97.5))
    return {"low": float(low), "high": float(high)}


def mean_sd(values: list[dict | float | None]) -> dict:
    """Mean, sample standard deviation (ddof 1) and number of the values that are defined, over runs
    or folds. A figure with an interval counts by its value."""
    plain = [v["value"] if isinstance(v, dict) else v for v in values]
    known = np.array([v for v in plain if v is not None])
    return {"n": len(known), "mean": float(known.mean()) if len(known) else None,
            "sd": float(known.std(ddof=1)) if len(known) > 1 else None}


# ---- two classifiers on the same images -------------------------------------------------------

def mcnemar(a: np.ndarray, b: np.ndarray) -> dict:
    """Exact two-sided McNemar test of two classifiers on the same images (McNemar 1947).
    a, b: bool [n], correct or not. The images that only one of them gets right are `a_only` and
    `b_only`; p is the binomial probability of a split at least as uneven, 1 where there is none."""
    a_only, b_only = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = a_only + b_only
    p = binomtest(a_only, discordant).pvalue if discordant else 1.0
    return {"a_only": a_only, "b_only": b_only, "p": float(p)}


def newcombe(both: int, a_only: int, b_only: int, neither: int) -> dict:
    """Difference of two accuracies on the same images with the 95 % interval of Newcombe (1998,
    Stat. Med. 17:2635, method 10): from the Wilson intervals of both, and the correlation φ between
    them with continuity correction. The four counts are images."""
    n = both + a_only + b_only + neither
    one, two = wilson(both + a_only, n), wilson(both + b_only, n)
    product = both * neither - a_only * b_only
    if product > 0:
        product = max(product - n / 2, 0)
    root = np.sqrt(float(both + a_only) * (b_only + neither) * (both + b_only) * (a_only + neither))
    phi = product / root if root else 0.0
    def reach(x: float, y: float) -> float:
        return float(np.sqrt(max(x * x - 2 * phi * x * y + y * y, 0)))
    value = (a_only - b_only) / n
    return {"value": value, "reason": None,
            "low": value - reach(one["value"] - one["low"], two["high"] - two["value"]),
            "high": value + reach(one["high"] - one["value"], two["value"] - two["low"])}


def paired_difference(a: np.ndarray, b: np.ndarray, members: np.ndarray | None = None,
                      name: str = "image", seed: int = 0) -> dict:
    """Mean of a - b over the same images with a 95 % interval.
    a, b: float [n], per image correct (0 or 1) or the share of several runs that are. members: the
    patient or group of each image, int [n], if they are known. For two single runs over images it
    is Newcombe's interval; else the percentile bootstrap, over whole units where they are known.
    Where these are too few the interval is None, and `reason` says why."""
    if members is None and set(np.unique([a, b])) <= {0, 1}:
        a, b = a.astype(bool), b.astype(bool)
        return newcombe(*(int(x.sum()) for x in (a & b, a & ~b, ~a & b, ~a & ~b)))
    members = np.arange(len(a)) if members is None else members
    change = a.astype(float) - b
    reason = too_few(change != 0, members, name, "a discordant image")
    interval = {"low": None, "high": None}
    if reason is None:
        sums, sizes = (np.bincount(np.unique(members, return_inverse=True)[1], x)
                       for x in (change, np.ones(len(a))))
        drawn = resample(np.arange(len(sums)), 10 * BOOTSTRAP, seed)
        interval = percentiles(drawn @ sums / (drawn @ sizes))
    return {"value": float(change.mean()), **interval, "reason": reason}
