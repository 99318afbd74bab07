"""Predictions → numbers with intervals. Always from pooled predictions, never means of means.

Undefined figures (a class absent from the split, a class never predicted) are None, not zero.
Intervals are 95 % and assume independent images; images of one patient are not, so they are too
narrow wherever patients contribute several images.
"""

import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, roc_auc_score

from dataset.files import CLASSES

BOOTSTRAP = 1000  # resamples of the percentile intervals
BINS = 15  # of the expected calibration error
FIGURES = ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1", "weighted_precision",
           "weighted_recall", "weighted_f1", "kappa", "roc_auc")  # one number each, of `measure`


def measure(logits: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict:
    """Every figure of one part of the data, as `results.json` has them (docs/run-folder.md).
    logits: float [n, C]; labels: int [n]. `loss` is the unweighted, unsmoothed cross-entropy. Macro
    figures are means over the classes present; there an undefined precision counts as 0, as in
    scikit-learn. `brier` is the sum over classes (0..2), `roc_auc` macro one-against-rest."""
    logits = np.asarray(logits, dtype=np.float64)
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    loss = -log_p[np.arange(len(labels)), labels].mean()
    figures = _measure(labels, logits.argmax(1), p, loss, classes)
    figures["ece"] = calibration_error(p, labels)
    figures["brier"] = _finite(((p - np.eye(len(classes))[labels]) ** 2).sum(1).mean())
    return figures


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
    figures["intervals"] = bootstrap(labels, predicted, p, len(classes))
    figures["confusion"] = confusion.tolist()
    figures["per_class"] = per_class
    figures["malignant"] = malignant(confusion, classes)
    return figures


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
    if "Benign" not in classes or not set(classes) <= {*CLASSES, "Malignant"}:
        return None
    b = classes.index("Benign")
    benign, rest = confusion[b].sum(), confusion.sum() - confusion[b].sum()
    missed = confusion[:, b].sum() - confusion[b, b]  # leukaemias called benign
    return {"sensitivity": wilson(int(rest - missed), int(rest)),
            "specificity": wilson(int(confusion[b, b]), int(benign))}


def calibration_error(p: np.ndarray, labels: np.ndarray) -> float | None:
    """Expected calibration error of the top class, 15 bins of equal width (Guo et al. 2017)."""
    confidence, correct = p.max(1), p.argmax(1) == labels
    bins = np.minimum((np.nan_to_num(confidence) * BINS).astype(int), BINS - 1)
    gaps = [abs(correct[bins == b].sum() - confidence[bins == b].sum()) for b in range(BINS)]
    return _finite(sum(gaps) / len(labels))


def bootstrap(labels: np.ndarray, predicted: np.ndarray, p: np.ndarray | None,
              num_classes: int, seed: int = 0) -> dict:
    """Percentile 95 % intervals of macro F1, κ and macro AUC over resampled images.
    Where a resample lacks a class, the mean is over the classes that it has. The seed is fixed."""
    n = len(labels)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), BOOTSTRAP)  # [R, n]
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
    return {name: percentiles(values) for name, values in
            (("macro_f1", _row_means(f1)), ("kappa", kappas), ("roc_auc", _row_means(aucs)))}


def resampled_auc(counts: np.ndarray, positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """AUC per resample, float [R], NaN where undefined; counts: int [R, n]; ties count half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    up = np.add.reduceat(counts[:, order] * positive[order], starts, axis=1)
    down = np.add.reduceat(counts[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(down, 1) - down
    with np.errstate(invalid="ignore"):
        return (up * (below + 0.5 * down)).sum(1) / (up.sum(1) * down.sum(1))


def _row_means(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


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
