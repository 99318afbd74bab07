"""Images that show the same thing: identical, recompressed, shifted, or overlapping fields of view.

Every pair is compared by phase correlation at 64 × 64 (Kuglin & Hines 1975): the height of the
peak is about the share of the field that two pictures have in common, wherever it lies. Pairs above
a threshold are then registered at full size, and kept where what overlaps correlates.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage.registration import phase_cross_correlation
from torch import Tensor
from tqdm import tqdm

from dataset.images import STRIP, Images
from dataset.splits import group

SIDE = 64  # of the small pictures that all pairs are compared at
PEAK = 0.12  # of the phase correlation; unrelated pairs of the ALL set stay below 0.11
OVERLAP = 0.3  # least share of the field that two pictures must have in common
CORRELATION = 0.6  # of the grey values there
BLOCK = 256  # pairs compared at once


@dataclass(frozen=True)
class Pair:
    """Two images, i < j, and why they belong together. shift: rows and columns, in pixels."""
    i: int
    j: int
    peak: float
    shift: tuple[int, int]
    overlap: float
    correlation: float


def grey(pixels: Tensor) -> Tensor:
    """float32 [n, h, W] of uint8 [n, 3, H, W], without the strip that the scale bar stands in."""
    height = pixels.shape[2]
    return pixels[:, :, :height - round(STRIP * height)].float().mean(1)


def spectra(pixels: Tensor) -> Tensor:
    """Whitened spectra, complex64 [n, SIDE, SIDE/2 + 1], of uint8 [n, 3, H, W], edges tapered."""
    edge, window = SIDE * 3 // 20, torch.ones(SIDE)
    ramp = 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(edge) + 0.5) / edge)
    window[:edge], window[-edge:] = ramp, ramp.flip(0)
    parts = []
    for batch in pixels.split(BLOCK):
        small = F.interpolate(grey(batch)[:, None], (SIDE, SIDE), mode="area")[:, 0]
        small = (small - small.mean((1, 2), keepdim=True)) * window[:, None] * window
        spectrum = torch.fft.rfft2(small)
        parts.append(spectrum / spectrum.abs().clamp_min(1e-6))
    return torch.cat(parts)


def candidates(pixels: Tensor) -> list[tuple[int, int, float]]:
    """(i, j, peak) of all pairs i < j whose phase correlation reaches PEAK."""
    whitened, found = spectra(pixels), []
    for i, one in enumerate(tqdm(whitened, "comparing", unit="image", leave=False, disable=None)):
        for start in range(i + 1, len(whitened), BLOCK):
            block = whitened[start:start + BLOCK]
            height = torch.fft.irfft2(one * block.conj(), s=(SIDE, SIDE)).flatten(1).amax(1)
            found += [(i, start + int(k), float(height[k])) for k in (height >= PEAK).nonzero()]
    return found


def register(a: np.ndarray, b: np.ndarray) -> tuple[tuple[int, int], float, float]:
    """(shift, overlap, correlation) of two grey pictures [h, W] at full size.
    The shift is that of `skimage.registration.phase_cross_correlation`, taken in either sense of
    the wrapped axes; overlap is the share of the field in common, correlation Pearson's r there."""
    shift, _, _ = phase_cross_correlation(a, b)
    best = ((0, 0), 0.0, -1.0)
    either = [{int(s), int(s - np.sign(s) * n)} for s, n in zip(shift, a.shape, strict=True)]
    for rows, columns in itertools.product(*either):
        one, two = (x[max(r, 0):x.shape[0] + min(r, 0), max(c, 0):x.shape[1] + min(c, 0)]
                    for x, r, c in ((a, rows, columns), (b, -rows, -columns)))
        overlap = one.size / a.size
        if overlap >= OVERLAP and one.std() > 0 and two.std() > 0:
            r = float(np.corrcoef(one.ravel(), two.ravel())[0, 1])
            best = max(best, ((rows, columns), overlap, r), key=lambda found: found[2])
    return best


def near_duplicates(pixels: Tensor) -> list[Pair]:
    """All pairs i < j of uint8 [n, 3, H, W] that show, for OVERLAP of the field or more, the same.
    Rotated, mirrored or rescaled copies are not looked for."""
    pairs = []
    for i, j, peak in candidates(pixels):
        a, b = grey(pixels[[i, j]]).numpy()
        shift, overlap, r = register(a, b)
        if r >= CORRELATION:
            pairs.append(Pair(i, j, peak, shift, overlap, r))
    return pairs


def exact_pairs(digests: list[str]) -> list[tuple[int, int]]:
    """(first, later) of images with equal decoded pixels."""
    first: dict[str, int] = {}
    return [(first[d], i) for i, d in enumerate(digests) if first.setdefault(d, i) != i]


def find_groups(images: Images) -> tuple[np.ndarray, dict, list[Pair]]:
    """(group of each image, counts, near pairs). Groups join identical images, and near
    duplicates of one class; across classes they are false alarms, or labels that disagree."""
    labels = images.labels.numpy()
    exact = exact_pairs(images.digests)
    near = [p for p in near_duplicates(images.pixels) if images.digests[p.i] != images.digests[p.j]]
    same = [p for p in near if labels[p.i] == labels[p.j]]
    groups = group(len(labels), [*exact, *((p.i, p.j) for p in same)])
    sizes = np.bincount(groups)
    counts = {"images": len(labels), "identical_copies": len(exact),
              "identical_across_classes": sum(labels[i] != labels[j] for i, j in exact),
              "near_pairs": len(near), "near_pairs_across_classes": len(near) - len(same),
              "groups": int((sizes > 0).sum()), "groups_of_several": int((sizes > 1).sum()),
              "images_in_them": int(sizes[sizes > 1].sum()), "largest_group": int(sizes.max())}
    return groups, {k: int(v) for k, v in counts.items()}, near
