"""Shortcut probes: what those parts of a file give away that show no cell, or not its shape.

Each probe is a table of numbers per image; the classifier is that of `baselines`. A network that
does not beat the best of them has not shown that it reads cells.
"""

import numpy as np
import torch.nn.functional as F
from PIL import Image

from data import Images
from dataset import interventions
from dataset.images import colour_statistics
from dataset.interventions import CORNER
from reporting import metrics
from reporting.baselines import make_classifier

FRAME = 0.04  # width of the border frame, share of the side


def masked_statistics(pixels: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The 21 colour statistics of the pixels of each image inside its mask, bool [n, H, W]."""
    return np.concatenate([colour_statistics(image[mask][None, :, None], "statistics")
                           for image, mask in zip(pixels, masks, strict=True)])


def background(images: Images) -> np.ndarray:
    """Colour of the brightest quarter of each image: the glass between the cells."""
    masks = np.stack([interventions.background(image.cpu()) for image in images.pixels])
    return masked_statistics(images.array(), masks)


def frame(images: Images) -> np.ndarray:
    """Colour of a border frame alone."""
    n, _, size, _ = images.pixels.shape
    width = max(1, round(FRAME * size))
    mask = np.ones((size, size), dtype=bool)
    mask[width:-width, width:-width] = False
    return masked_statistics(images.array(), np.broadcast_to(mask, (n, size, size)))


def corner(images: Images) -> np.ndarray:
    """Grey thumbnail, 8 × 16, of the lower right corner, where the scale bar is burnt in."""
    size = images.pixels.shape[2]
    left, top, right, bottom = (round(x * size) for x in CORNER)
    cut = images.pixels[:, :, top:bottom, left:right].cpu().float().mean(1, keepdim=True)
    return F.interpolate(cut, (8, 16), mode="area").flatten(1).numpy()


def header(images: Images) -> np.ndarray:
    """What a file says before any pixel: its size in bytes, width, height, mode, JPEG tables, the
    number of quantisation tables, progressive or not, dots per inch, length of its metadata."""
    rows = []
    for path in images.paths:
        with Image.open(images.root / path) as image:
            tables, info = getattr(image, "quantization", None) or {}, image.info
            dpi = info.get("dpi", (0, 0))
            rows.append([(images.root / path).stat().st_size, *image.size, len(image.getbands()),
                         len(tables), *(np.mean(tables[k]) if k in tables else 0 for k in (0, 1)),
                         info.get("progressive", 0), float(dpi[0]),
                         *(len(info.get(key) or b"") for key in ("exif", "icc_profile"))])
    return np.nan_to_num(np.array(rows, dtype=np.float64))  # a resolution of 0/0 is none


def features(images: Images) -> dict[str, np.ndarray]:
    """Probe name → float [n, d], NaN-free. The header needs files on disk."""
    found = {"colour means": colour_statistics(images.array(), "means"),
             "colour statistics": colour_statistics(images.array(), "statistics"),
             "background only": background(images), "scale-bar corner only": corner(images),
             "border frame only": frame(images)}
    if images.root is not None:
        found["file size and header only"] = header(images)
    return found


def fit_predict(x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray,
                kind: str = "rbf-svm") -> np.ndarray:
    """Predictions int [len(test)] of the probe's classifier fitted on the training part; where that
    has one class, this class."""
    if len(known := np.unique(labels[train])) == 1:
        return np.repeat(known, len(test))
    return make_classifier(kind).fit(x[train], labels[train]).predict(x[test])


def score(x: np.ndarray, labels: np.ndarray, several: list[dict], kind: str = "rbf-svm") -> dict:
    """Accuracy with Wilson interval, pooled over the test parts of `several` splits (folds)."""
    hits = sum(int((fit_predict(x, labels, s["train"], s["test"], kind) == labels[s["test"]]).sum())
               for s in several)
    return metrics.wilson(hits, sum(len(s["test"]) for s in several))
