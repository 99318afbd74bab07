"""Two classifiers on the same images: tests and intervals of their difference."""

import numpy as np
from scipy.stats import binomtest

from reporting.metrics import BOOTSTRAP, percentiles, resample, too_few, wilson


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
