"""What colour alone gives away: classifiers on whole-image colour statistics, no network.

A network that does not beat these has shown nothing about cells.
"""

from checks import warn

from functools import lru_cache

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from dataset.images import Images, colour_statistics
from dataset.splits import Split
from reporting.metrics import wilson

MOST = 10_000  # training images that a classifier is fitted on: the SVM's time grows with n²


@lru_cache(maxsize=1)  # folds, seeds and networks of one run share them
def colour_features(images: Images) -> dict[tuple[str, str], np.ndarray]:
    """The statistics of every image, by (features, strip)."""
    kinds = ("means", "included"), ("statistics", "included"), ("statistics", "cut")
    return {(kind, strip): colour_statistics(images.array(), kind, strip == "cut")
            for kind, strip in kinds}


def make_classifier(kind: str) -> Pipeline:
    """`1-nn`, or `rbf-svm` with C = 10 and gamma "scale"; features standardised where fitted."""
    return make_pipeline(StandardScaler(), KNeighborsClassifier(1) if kind == "1-nn" else SVC(C=10))


def colour_only(images: Images, split: Split) -> list[dict]:
    """Accuracy with Wilson interval on validation and test, a row per statistics and classifier.
    Fitted on the training part; of more than MOST images on a random sample, always the same."""
    labels, rows, train = images.labels.numpy(), [], split["train"]
    if len(train) > MOST:
        train = np.sort(np.random.default_rng(0).choice(train, MOST, replace=False))
        warn(f"note: colour alone is fitted on a sample, {MOST} of {len(split['train'])} training "
             "images")
    for (kind, strip), x in colour_features(images).items():
        for name in ("1-nn", "rbf-svm"):
            row = {"features": kind, "strip": strip, "classifier": name, "fitted_on": len(train)}
            one = len(set(labels[train].tolist())) < 2  # nothing to tell apart
            fitted = None if one else make_classifier(name).fit(x[train], labels[train])
            for part in ("val", "test"):
                indices = split[part] if fitted else split[part][:0]
                correct = sum(fitted.predict(x[indices]) == labels[indices]) if len(indices) else 0
                row[part] = wilson(int(correct), len(indices))
            rows.append(row)
    return rows
