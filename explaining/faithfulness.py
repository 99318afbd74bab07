"""Whether to believe an explanation: does it point at what the answer depends on, and at what was
learnt? All functions work on maps [H, W], whatever made them."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.stats import spearmanr
from scipy.stats import t as student
from torch import Tensor

GRID = 14  # cells a side that deletion removes; 16 pixels each at 224
PER_STEP = 14  # cells removed between two looks


def cell_means(values: np.ndarray) -> np.ndarray:
    """[GRID²]: mean of a map [H, W] over each cell of the grid."""
    cells = cell_index(values.shape).ravel()
    return np.bincount(cells, values.ravel(), GRID**2) / np.bincount(cells)


def cell_index(shape: tuple[int, int]) -> np.ndarray:
    """int [H, W]: the grid cell of each pixel."""
    rows, columns = (np.arange(n) * GRID // n for n in shape)
    return rows[:, None] * GRID + columns


def deletion_area(classify: Callable[[Tensor], np.ndarray], pixels: Tensor, target: int,
                  order: np.ndarray) -> float:
    """Area under the probability of `target` while cells are painted over in `order` (RISE, Petsiuk
    et al. 2018), trapezoid over the share removed, 0..1; lower = the order finds the evidence.
    pixels: uint8 [3, H, W]; the paint is the image's mean colour. order: GRID² cells. Compare with
    random orders of the same cells only: the paint itself disturbs the network."""
    rank = np.empty(GRID**2, dtype=np.int64)
    rank[order] = np.arange(GRID**2)
    removed = torch.from_numpy(rank[cell_index(tuple(pixels.shape[1:]))])
    paint = pixels.float().mean((1, 2), keepdim=True).round().byte()
    steps = range(0, GRID**2 + 1, PER_STEP)
    batch = torch.stack([torch.where(removed < done, paint, pixels) for done in steps])
    p = classify(batch)[:, target]
    return float(trapezoid(p, dx=1 / (len(p) - 1)))


def random_area(classify: Callable[[Tensor], np.ndarray], pixels: Tensor, target: int,
                seed: int, orders: int = 4) -> float:
    """Mean deletion area of random orders."""
    rng = np.random.default_rng(seed)
    return float(np.mean([deletion_area(classify, pixels, target, rng.permutation(GRID**2))
                          for _ in range(orders)]))


def randomised(model: torch.nn.Module, fresh: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """`model`'s state with the top `share` of its layers, from the head down, those of an untrained
    network of the same kind (cascading randomisation, Adebayo et al. 2018)."""
    layers = list(dict.fromkeys(key.rpartition(".")[0] for key in fresh))
    top = layers[len(layers) - max(1, round(share * len(layers))):]
    return {key: (fresh if key.rpartition(".")[0] in top else model.state_dict())[key].clone()
            for key in fresh}


def is_flat(values: np.ndarray) -> bool:
    """Whether a map shows nothing: all its values are equal, up to the rounding of float32."""
    return bool(np.ptp(values) <= 1e-5 * np.abs(values).max())


def rank_correlation(a: np.ndarray, original: np.ndarray) -> float | None:
    """Spearman's ρ of two maps' magnitudes; None where one is flat: a map that shows nothing cannot
    show that it depends on the weights, nor can a network that answers nothing."""
    a, b = np.abs(a).ravel(), np.abs(original).ravel()
    return None if is_flat(a) or is_flat(b) else float(spearmanr(a, b).statistic)


def jaccard(weights: list[np.ndarray], top: int = 5) -> float:
    """Mean over pairs of |A ∩ B| / |A ∪ B| of the `top` superpixels by weight."""
    sets = [set(np.argsort(w)[::-1][:top].tolist()) for w in weights]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    return float(np.mean([len(a & b) / len(a | b) for a, b in pairs]))


def share_inside(values: np.ndarray, region: np.ndarray) -> float | None:
    """Share of a map's magnitude inside a region, bool [H, W]; None where the map is all zero."""
    total = np.abs(values).sum()
    return float(np.abs(values)[region].sum() / total) if total else None


def rectangle(shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """bool [H, W] of (left, top, right, bottom), shares of width and height."""
    left, top, right, bottom = box
    rows, columns = ((np.arange(side) + 0.5) / side for side in shape)
    return ((rows >= top) & (rows < bottom))[:, None] & (columns >= left) & (columns < right)


def mean_interval(values: list[float | None]) -> dict:
    """Mean over images with Student's 95 % interval; None where fewer than two are defined."""
    known = np.array([v for v in values if v is not None])
    n = len(known)
    if n < 2:
        return {"n": n, "value": float(known.mean()) if n else None, "low": None, "high": None}
    half = student.ppf(0.975, n - 1) * known.std(ddof=1) / np.sqrt(n)
    mean = known.mean()
    return {"n": n, "value": float(mean), "low": float(mean - half), "high": float(mean + half)}
