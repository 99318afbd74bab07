"""What colour alone gives away: classifiers on whole-image colour statistics, no network.

A network that does not beat these has shown nothing about cells.
"""

from functools import lru_cache

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from data import Images
from dataset.splits import Split
from reporting.metrics import wilson

STRIP = 0.12  # share of the height cut off below: the burnt-in scale bar stands there


def colour_statistics(pixels: np.ndarray, kind: str, cut_strip: bool = False) -> np.ndarray:
    """float32 [n, 3] (`means` of R, G, B) or [n, 21] (`statistics`: of each channel the mean,
    the standard deviation and the 5, 25, 50, 75, 95 % quantiles). pixels: uint8 [n, H, W, 3]."""
    height = pixels.shape[1] - round(STRIP * pixels.shape[1]) * cut_strip
    rows = []
    for image in pixels[:, :height]:
        flat = image.reshape(-1, 3).astype(np.float32)
        row = [flat.mean(0)]
        if kind == "statistics":
            row += [flat.std(0), *np.percentile(flat, (5, 25, 50, 75, 95), axis=0)]
        rows.append(np.concatenate(row))
    return np.array(rows, dtype=np.float32)


@lru_cache(maxsize=1)  # folds, seeds and networks of one run share them
def colour_features(images: Images) -> dict[tuple[str, str], np.ndarray]:
    """The statistics of every image, by (features, strip)."""
    kinds = ("means", "included"), ("statistics", "included"), ("statistics", "cut")
    return {(kind, strip): colour_statistics(images.array(), kind, strip == "cut")
            for kind, strip in kinds}


def make_classifier(kind: str) -> Pipeline:
    """`1-nn`, or `rbf-svm` with C = 10 and gamma "scale"; features standardised where fitted."""
    return make_pipeline(StandardScaler(),
                         KNeighborsClassifier(1) if kind == "1-nn" else SVC(C=10))


def colour_only(images: Images, split: Split) -> list[dict]:
    """Accuracy with Wilson interval on validation and test, a row per statistics and classifier.
    Fitted on the training part."""
    labels, rows = images.labels.numpy(), []
    for (kind, strip), x in colour_features(images).items():
        for name in ("1-nn", "rbf-svm"):
            row = {"features": kind, "strip": strip, "classifier": name}
            one = len(set(labels[split["train"]].tolist())) < 2  # nothing to tell apart
            fitted = None if one else make_classifier(name).fit(
                x[split["train"]], labels[split["train"]])
            for part in ("val", "test"):
                indices = split[part] if fitted else split[part][:0]
                correct = sum(fitted.predict(x[indices]) == labels[indices]) if len(indices) else 0
                row[part] = wilson(int(correct), len(indices))
            rows.append(row)
    return rows
