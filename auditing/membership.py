"""Membership from scores: stratified AUC, what so few images can resolve, and the nulls beside it.

Every attack of privacy.py is a score for each image, higher where the image looks like one that the
network was trained on. T targets are models whose members differ (hospitals): scores float [T, n],
members bool [T, n]. The non-members, bool [n], are common to all of them.
"""

import checks  # noqa: F401 - before torch

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from scipy.stats import beta, binomtest

from dataset.splits import Split
from reporting import metrics

POWER = 2.80  # 1.96 + 0.84: standard errors that a two-sided 5 % test finds in 80 of 100 cases
PERMUTATIONS = 1000  # of the owners in A4


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """φ, float64 [n]. logits: float [n, C]; labels: int [n]. From the logits, because probabilities
    near 1 tie in float32 and would pull the AUC to 0.5."""
    z, own = np.asarray(logits, dtype=np.float64), np.eye(logits.shape[1], dtype=bool)[labels]
    return z[own] - logsumexp(z, axis=1, b=~own)


@dataclass(frozen=True, eq=False)
class Sides:
    """The images that the attacks are tried on: the training and the test part of one split."""
    indices: np.ndarray  # int64 [n] into the images, ascending
    labels: np.ndarray  # int64 [n]
    groups: np.ndarray  # int [n]: duplicates, or patients, that are drawn together
    owner: np.ndarray  # int [n]: the hospital of a training image; -1 of a test image
    single: np.ndarray  # bool [n]: no other image of its group is in training

    def members(self, hospitals: list[int]) -> np.ndarray:
        """bool [K, n]: the training images of each of these hospitals, without partner."""
        return (self.owner == np.array(hospitals)[:, None]) & self.single

    @property
    def outside(self) -> np.ndarray:
        """bool [n]: the test images without partner."""
        return (self.owner < 0) & self.single


def make_sides(labels: np.ndarray, split: Split, clients: list[np.ndarray],
               groups: np.ndarray) -> Sides:
    """labels, groups: int [N] of all images. clients: training images of each hospital; where there
    are none, all training images are those of number 0."""
    owner, train = np.full(len(labels), -2), np.zeros(len(labels), dtype=int)
    owner[split["test"]], owner[split["train"]], train[split["train"]] = -1, 0, 1
    for k, own in enumerate(clients):
        owner[own] = k
    place = np.unique(groups, return_inverse=True)[1]
    partners = np.bincount(place, train)[place] - train  # an image is no partner of itself
    indices = np.flatnonzero(owner > -2)
    return Sides(indices, labels[indices], groups[indices], owner[indices], partners[indices] == 0)


def stratified_auc(scores: np.ndarray, members: np.ndarray, outside: np.ndarray,
                   labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Σ pairs of a member and a non-member that the member wins (ties ½) / Σ pairs, the pairs being
    of one class and one target: float [R], NaN without any. Pooling classes would invent leakage:
    a random split gives the parts different class mixes.
    scores: float [T, n], a row a target; members: bool [T, n]; outside: bool [n]; counts: int
    [R, n], how often each image is in each resample."""
    won, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for score, member in zip(scores, members, strict=True):
        for c in np.unique(labels):
            take = np.flatnonzero((labels == c) & (member | outside))
            positive = member[take]
            if positive.any() and not positive.all():
                drawn = counts[:, take]
                weight = (drawn @ positive) * (drawn @ ~positive)
                auc = metrics.resampled_auc(drawn, positive, score[take])
                won, pairs = won + np.nan_to_num(auc) * weight, pairs + weight
    with np.errstate(invalid="ignore"):
        return won / pairs


def resample(members: np.ndarray, outside: np.ndarray, labels: np.ndarray, groups: np.ndarray,
             seed: int) -> np.ndarray:
    """How often each image is in each resample, int [R, n]: whole groups are drawn, within their
    class and their side. All scores of an image share its number. members: bool [n]."""
    first, unit = np.unique(groups, return_index=True, return_inverse=True)[1:]
    inside, out = (np.bincount(unit, side) > 0 for side in (members, outside))
    stratum = (4 * labels[first] + 2 * inside + out)[unit]
    counts = np.empty((metrics.BOOTSTRAP, len(labels)), dtype=np.int64)
    for s in np.unique(stratum):  # a seed each: equal sizes must not give equal draws
        take = stratum == s
        counts[:, take] = metrics.resample(groups[take], metrics.BOOTSTRAP, [seed, int(s)])
    return counts


def attack(scores: np.ndarray, members: np.ndarray, outside: np.ndarray, sides: Sides,
           seed: int = 0) -> dict:
    """The AUC of an attack with its percentile 95 % interval, its standard error (of the group
    bootstrap), and the smallest AUC that these images would have told from 0.5 with a power of
    80 %: 0.5 + 2.80 s.e. These are None for fewer than 30 groups, or than ten on a side, and the
    latter two where no resample differs from another (a network that says the same of all images).
    scores: float [T, n]; members: bool [T, n]; outside: bool [n]."""
    used = members.any(0) | outside
    scores, members, outside = scores[:, used], members[:, used], outside[used]
    labels, any_member = sides.labels[used], members.any(0)
    once = np.ones((1, len(labels)), dtype=np.int64)
    value = stratified_auc(scores, members, outside, labels, once)[0]
    out = {"value": float(value) if np.isfinite(value) else None, "low": None, "high": None,
           "se": None, "detectable": None, "members": int(any_member.sum()),
           "non_members": int(outside.sum())}
    groups = sides.groups[used]
    several = [len(np.unique(groups[side])) for side in (any_member, outside)]
    if out["value"] is None or sum(several) < metrics.LEAST or min(several) < metrics.LEAST_WRONG:
        return out
    counts = resample(any_member, outside, labels, groups, seed)
    values = stratified_auc(scores, members, outside, labels, counts)
    se = float(values[np.isfinite(values)].std(ddof=1))
    return out | metrics.percentiles(values) | (
        {"se": se, "detectable": 0.5 + POWER * se} if se > 0 else {})


def caught(score: np.ndarray, member: np.ndarray, outside: np.ndarray,
           labels: np.ndarray) -> tuple[np.ndarray, int]:
    """(int [n], m): how many of m members score above the (k+1)-th highest of n non-members, for
    k = 0 … n-1. Scores are taken less the median of their class's non-members, so that one
    threshold serves all classes. score: float [n images]; member, outside: bool [n images]."""
    centred = np.full(len(score), np.nan)
    for c in np.unique(labels[outside]):
        here = labels == c
        centred[here] = score[here] - np.median(score[here & outside])
    false = np.sort(centred[outside])[::-1]
    true = np.sort(centred[member & np.isfinite(centred)])
    return len(true) - np.searchsorted(true, false, side="right"), len(true)


def rates(hits: np.ndarray, m: int) -> list[dict]:
    """True positive rates, with Clopper and Pearson's interval, at 0 and at ⌊n/100⌋ false positives
    of n non-members: below 1/n nothing is resolvable. Beside each the 95 % interval of the true
    false positive rate of its threshold, the (k+1)-th highest non-member: Beta(k+1, n-k) whatever
    the distribution; one-sided where k is 0. hits, m: as `caught` returns them."""
    n, out = len(hits), []
    for k in sorted({0, n // 100}) if m and n else []:
        false = beta(k + 1, n - k).ppf([0.025, 0.975] if k else [0, 0.95])
        low, high = binomtest(int(hits[k]), m).proportion_ci(method="exact")
        out.append({"false_positives": k, "n": n, "false_low": float(false[0]),
                    "false_high": float(false[1]), "hits": int(hits[k]), "members": m,
                    "value": float(hits[k] / m), "low": float(low), "high": float(high)})
    return out


def described(scores: np.ndarray, members: np.ndarray, sides: Sides) -> dict:
    """An attack with all that is told of it: AUC over all targets, of each target, and the curve
    that `membership.png` draws: mean true positive rate over targets, at k = 0 … n-1."""
    outside, curves, each = sides.outside, [], []
    for score, member in zip(scores, members, strict=True):
        hits, m = caught(score, member, outside, sides.labels)
        curves += [hits / m] if m else []
        each.append(attack(score[None], member[None], outside, sides) | {"rates": rates(hits, m)})
    return attack(scores, members, outside, sides) | {
        "targets": each, "curve": np.mean(curves, 0).tolist() if curves else []}


# ---- references, nulls, sources -----------------------------------------------------------------

def of_others(phi: np.ndarray) -> np.ndarray:
    """For each model the mean φ of all others, what an image's difficulty is elsewhere: float
    [K, n], K ≥ 2. A2 takes it from the global model's φ, A3 from that of the update itself."""
    return (phi.sum(0) - phi) / (len(phi) - 1)


def controls(phi: np.ndarray, hospitals: list[int], sides: Sides) -> dict:
    """Attacks with a known answer of 0.5: the images of hospital k as members, the model of j ≠ k
    as target, the models of the rest as reference. One by one and not pooled: over the targets j
    the scores of an image add up to 0, so that a pooled AUC would be near 0.5 whatever happened.
    phi: float [K, n], a row a hospital's model."""
    each = []
    for k, j in itertools.permutations(range(len(phi)), 2):
        rest = np.delete(phi, [j, k], axis=0)
        score = phi[j] - (rest.mean(0) if len(rest) else 0)
        each.append({"model": hospitals[j], "images": hospitals[k], **attack(
            score[None], sides.members([hospitals[k]]), sides.outside, sides)})
    return {"each": each}


def of_nobody(scores: np.ndarray, sides: Sides, seed: int = 0) -> dict:
    """The attack on each hospital with half of the test images in the members' place: images of no
    hospital, hence 0.5. Whole groups go to one half, within their class. Not pooled, for the same
    reason as `controls`. scores: float [K, n]."""
    rng, half = np.random.default_rng(seed), np.zeros(len(sides.labels), dtype=bool)
    for c in np.unique(sides.labels):
        here = sides.outside & (sides.labels == c)
        half |= here & np.isin(sides.groups, rng.permutation(np.unique(sides.groups[here]))[::2])
    return {"each": [attack(score[None], half[None], sides.outside & ~half, sides)
                     for score in scores]}


def sources(phi: np.ndarray, hospitals: list[int], sides: Sides, seed: int = 0) -> dict:
    """A4: each training image is attributed to the hospital whose update has the highest φ. Beside
    the share that is right, with Wilson's interval: 1/K, the share of the largest hospital, and
    owners permuted within their class (hospitals with other class mixes favour other classes,
    which says nothing of an image). phi: float [K, n]."""
    rows = np.flatnonzero(sides.members(hospitals).any(0))
    owner = np.searchsorted(hospitals, sides.owner[rows])
    found, labels, k = phi[:, rows].argmax(0), sides.labels[rows], len(hospitals)
    rng, right = np.random.default_rng(seed), np.zeros(PERMUTATIONS)
    for c in np.unique(labels):
        here = labels == c
        right += [(rng.permutation(owner[here]) == found[here]).sum() for _ in right]
    right /= max(len(rows), 1)
    return {**metrics.wilson(int((owner == found).sum()), len(rows)), "n": len(rows),
            "matrix": np.bincount(owner * k + found, minlength=k * k).reshape(k, k).tolist(),
            "one_of_k": 1 / k,
            "largest": float(np.bincount(owner, minlength=k).max() / max(len(rows), 1)),
            "permuted": {"value": float(right.mean()), **metrics.percentiles(right)}}
