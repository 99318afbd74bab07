"""Two classifiers on the same images, and images that come in groups: tests and intervals."""

import numpy as np
from scipy.stats import binomtest

from reporting.metrics import BOOTSTRAP, percentiles


def cluster_bootstrap(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> dict:
    """Mean of `values`, float [n], with a 95 % interval by the percentile bootstrap over whole
    groups: for images that are alike within a group and independent between groups."""
    _, members = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(members, values.astype(float)), np.bincount(members)
    k = len(sizes)
    drawn = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), 10 * BOOTSTRAP)
    means = drawn @ sums / (drawn @ sizes)
    return {"value": float(values.mean()), **percentiles(means)}


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict:
    """Exact two-sided McNemar test of two classifiers on the same images (McNemar 1947).
    a, b: bool [n], correct or not. The images that only one of them gets right are `a_only` and
    `b_only`; p is the binomial probability of a split at least as uneven, 1 where there is none."""
    a_only, b_only = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = a_only + b_only
    p = binomtest(a_only, discordant).pvalue if discordant else 1.0
    return {"a_only": a_only, "b_only": b_only, "p": float(p)}


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict:
    """Mean of a - b over the same images with its percentile bootstrap 95 % interval.
    a, b: float [n], per image correct (0 or 1) or the share of several runs that are. Images are
    resampled in pairs."""
    n = len(a)
    values, counts = np.unique(a.astype(float) - b, return_counts=True)  # few distinct
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, 10 * BOOTSTRAP)
    return {"value": float(values @ counts / n), **percentiles(drawn @ values / n)}
