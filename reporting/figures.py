"""Every figure (PNG): curves, matrices and bars; grids of images for explanations and audits."""

from checks import warn

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.special import softmax
from sklearn.metrics import roc_curve

from dataset.images import Images
from dataset.interventions import INTERVENTIONS, apply
from models import write_whole

ROWS = 8  # of one page
matplotlib.rcParams["text.parse_math"] = False  # a class may have "$" in its name


# ---- of a run and of an audit: curves, matrices, bars ------------------------------------------

@contextmanager
def drawing(path: Path, width: float, height: float, columns: int = 1) -> Iterator:
    """One axis, or a list of `columns` axes, to draw on; written to `path` at the end."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, columns, squeeze=False)[0]
    yield axes[0] if columns == 1 else axes
    save(figure, path, 120)


def clean(text: str) -> str:
    return str(text).encode("utf-8", "replace").decode()


@lru_cache  # of one process one line is enough
def say_missing(glyphs: str) -> None:
    warn(f"note: the font of the figures lacks letters of the names in them ({glyphs})")


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure. Letters that the font lacks become boxes, and one line says so; bytes of file
    names that are no letters become question marks."""
    for text in figure.findobj(Text):
        text.set_text(clean(text.get_text()))
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if labels != list(map(clean, labels)):
            axis.set_ticks(axis.get_ticklocs(), list(map(clean, labels)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=dpi,
                                                      bbox_inches="tight"))
    if any("missing from" in str(w.message) for w in caught):
        say_missing(matplotlib.rcParams["font.family"][0])


def plot_curves(histories: list[list[dict]], path: Path, unit: str = "epoch",
                best: int | None = None) -> None:
    """The paper's Fig. 3: training and validation, loss and accuracy, against rounds or epochs.
    Of several histories the mean, shaded by ± one standard deviation; where early stopping ends
    some of them sooner, over those that go on. best: the round or epoch to mark."""
    with drawing(path, 9, 3.4, columns=2) as axes:
        for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
            for part, name in (("train", "training (augmented batches)"), ("val", "validation")):
                values: dict[int, list[float]] = {}
                for record in (r for history in histories for r in history):
                    if record[f"{part}_{key}"] is not None:
                        values.setdefault(record[unit], []).append(record[f"{part}_{key}"])
                mean = np.array([np.mean(v) for v in values.values()])
                sd = np.array([np.std(v, ddof=1) if len(v) > 1 else 0 for v in values.values()])
                many = f", mean of {len(histories)} ± sd" if len(histories) > 1 else ""
                axis.plot(list(values), mean, "o-", ms=3, label=name + many)
                axis.fill_between(list(values), mean - sd, mean + sd, alpha=0.2)
            if best is not None:
                axis.axvline(best, color="grey", lw=0.8, ls="--", label=f"best {unit}")
            axis.set(xlabel=unit, ylabel=key)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)


def draw_counts(axis, matrix: list[list[int]], names: list[str]) -> None:
    """A square table of counts, each shaded by its share of the row."""
    counts = np.array(matrix)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        axis.text(j, i, str(count), ha="center", va="center",
                  color="white" if share[i, j] > 0.5 else "black")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)


def plot_confusion(confusion: list[list[int]], classes: list[str], title: str, path: Path) -> None:
    """Counts, shaded by the share of the true class."""
    size = max(3.6, 0.8 * len(classes))
    with drawing(path, size, size) as axis:
        draw_counts(axis, confusion, classes)
        axis.set(xlabel="predicted", ylabel="true", title=title)


def plot_roc(logits: np.ndarray, labels: np.ndarray, classes: list[str], per_class: dict,
             path: Path) -> None:
    """One-against-rest ROC curve of each class present."""
    p = softmax(logits.astype(np.float64), axis=1)
    with drawing(path, 4.4, 4) as axis:
        for c, name in enumerate(classes):
            auc = per_class[name]["auc"]
            if auc is not None:
                false_rate, true_rate, _ = roc_curve(labels == c, p[:, c])
                axis.plot(false_rate, true_rate, label=f"{name}, AUC {auc:.4f}")
        axis.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--", label="chance")
        axis.set(xlabel="1 - specificity", ylabel="sensitivity", title="one against rest, test")
        axis.legend(fontsize=8, loc="lower right")


def plot_probes(rows: dict[str, dict], chance: float, path: Path) -> None:
    """Accuracy of each shortcut probe with its interval, by way of splitting."""
    with drawing(path, 7, 0.6 * len(rows) + 1.2) as axis:
        for k, name in enumerate(next(iter(rows.values()))):
            value, low, high = (np.array([row[name][key] for row in rows.values()])
                                for key in ("value", "low", "high"))
            axis.errorbar(value, np.arange(len(rows)) + 0.18 * k, xerr=[value - low, high - value],
                          fmt="o", ms=4, label=name)
        axis.axvline(chance, color="grey", ls="--", lw=0.8, label="largest class")
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set(xlabel="accuracy", xlim=(0, 1.02))
        axis.legend(fontsize=8)


def plot_seeds(seeds: dict, path: Path) -> None:
    """Accuracy of one probe over random split seeds, seed 42 marked."""
    with drawing(path, 5, 3) as axis:
        axis.hist(seeds["values"], bins=20)
        axis.axvline(seeds["seed_42"], color="C3", label="seed 42")
        axis.set(xlabel="accuracy, nearest neighbour on colour statistics", ylabel="split seeds")
        axis.legend(fontsize=8)


def plot_reliability(p: np.ndarray, labels: np.ndarray, path: Path, bins: int = 10) -> None:
    """Accuracy against confidence of the top class, marker area by number of images."""
    confidence, correct = p.max(1), p.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    used = [place == b for b in np.unique(place)]  # bool [n] for each bin that holds an image
    with drawing(path, 4, 4) as axis:
        axis.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
        axis.scatter([confidence[b].mean() for b in used], [correct[b].mean() for b in used],
                     s=[20 + 200 * b.mean() for b in used])
        axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02),
                 title=f"n = {len(labels)}")


def plot_clients(images: Images, clients: list[np.ndarray], colour: np.ndarray, path: Path) -> None:
    """Client × class counts of the training part, and each client's mean colour at the end of its
    row. colour: float [n, 3], the mean colour of each image, 0..255."""
    counts, classes = np.array([images.class_counts(own) for own in clients]), images.classes
    with drawing(path, 5.5, max(1.8, 0.4 * len(clients) + 1)) as axis:
        left = np.zeros(len(clients))
        for c, name in enumerate(classes):
            axis.barh(range(len(clients)), counts[:, c], left=left, label=name)
            left += counts[:, c]
        axis.barh(range(len(clients)), 0.04 * left.max(), left=left + 0.02 * left.max(),
                  color=[colour[own].mean(0) / 255 for own in clients], edgecolor="grey")
        axis.set(xlabel="training images; the last field is the mean colour", ylabel="client")
        axis.set_yticks(range(len(clients)), images.client_names(clients))
        axis.invert_yaxis()
        axis.legend(fontsize=8, ncols=len(classes), loc="lower center", bbox_to_anchor=(0.5, 1))


# ---- grids of images ---------------------------------------------------------------------------

def scale(values: np.ndarray) -> float:
    """The magnitude of full colour: the 99th percentile, so one pixel does not darken the rest."""
    return float(np.percentile(np.abs(values), 99)) or float(np.abs(values).max()) or 1.0


def _show(axis, pixels, text: str = "") -> None:
    """A picture, uint8 [3, H, W], with its name at the left."""
    axis.imshow(np.moveaxis(np.asarray(pixels), 0, -1))
    axis.set_ylabel(text, fontsize=7, rotation=0, ha="right", va="center")


def _words(subject, target: int, classes: list[str]) -> str:
    truth = "" if subject.truth is None else f", truth {classes[subject.truth]}"
    return (f"{subject.path.rsplit('/', 1)[-1]}\npredicted {classes[subject.p.argmax()]} "
            f"{subject.p.max():.3f}{truth}\nexplained: {classes[target]} {subject.p[target]:.3f}")


@contextmanager
def _grid(path: Path, rows: int, titles: list[str]) -> Iterator[np.ndarray]:
    """Axes [rows, columns] without ticks, a title over each column; written at the end."""
    figure = Figure(figsize=(2.1 * len(titles) + 2.4, 2.1 * rows + 0.3))
    axes = figure.subplots(rows, len(titles), squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    yield axes
    save(figure, path, 100)


def draw_map(axis, values: np.ndarray, alpha: float = 1.0) -> None:
    """Magnitudes in one colour; red for and blue against where a map has a sign."""
    top = scale(values)
    colours, low = ("RdBu_r", -top) if values.min() < 0 else ("inferno", 0)
    axis.imshow(values, cmap=colours, vmin=low, vmax=top, alpha=alpha)


def plot_maps(entries: list[tuple], method: str, classes: list[str], path: Path) -> None:
    """Fig. 5: a row per image and class. entries: (subject, class, map)."""
    with _grid(path, len(entries), ["image", method, "overlay"]) as axes:
        for row, (subject, target, values) in zip(axes, entries, strict=True):
            _show(row[0], subject.pixels, _words(subject, target, classes))
            draw_map(row[1], values)
            _show(row[2], subject.pixels)
            draw_map(row[2], values, alpha=0.5)


def plot_lime(entries: list[tuple], classes: list[str], path: Path, top: int = 5) -> None:
    """Fig. 6: `top` superpixels for and against. entries: (subject, class, segments, weights)."""
    with _grid(path, len(entries), ["image", "for", "against", "weights"]) as axes:
        for row, (subject, target, segments, weights) in zip(axes, entries, strict=True):
            _show(row[0], subject.pixels, _words(subject, target, classes))
            order = np.argsort(weights)
            for axis, chosen in ((row[1], [s for s in order[::-1][:top] if weights[s] > 0]),
                                 (row[2], [s for s in order[:top] if weights[s] < 0])):
                shown = np.isin(segments, chosen)
                _show(axis, np.where(shown, subject.pixels, subject.pixels // 4))
                if chosen:
                    axis.contour(shown, levels=[0.5], colors="yellow", linewidths=0.8)
            draw_map(row[3], weights[segments])


def write(out: Path, subjects: list, founds: list[dict], classes: list[str],
          methods: tuple[str, ...]) -> None:
    """Every figure: a grid per method in pages, lime-for-and-against of a malignant and a benign
    image (the first of each, rightly predicted where there is one)."""
    pairs = list(zip(subjects, founds, strict=True))
    for method in methods:
        entries = [(s, target, found["maps"][method, target])
                   for s, found in pairs for target in s.targets()]
        for page, start in enumerate(range(0, len(entries), ROWS), 1):
            plot_maps(entries[start:start + ROWS], method, classes, out / f"{method}-{page}.png")
    two = {}
    for s, found in sorted(pairs, key=lambda pair: pair[0].truth != pair[0].p.argmax()):
        name = classes[s.targets()[0] if s.truth is None else s.truth]
        two.setdefault(name == "Benign", (s, s.targets()[0], found["segments"],
                                          found["lime"][0][s.targets()[0]]))
    plot_lime([two[key] for key in sorted(two)], classes, out / "lime-for-and-against.png")


def plot_pairs(images, pairs: list, path: Path, count: int = 6) -> None:
    """Some near duplicates side by side, evenly spaced by correlation. Local use only."""
    places = np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int)
    ordered = sorted(pairs, key=lambda p: p.correlation)
    chosen = [ordered[i] for i in places]
    with _grid(path, max(len(chosen), 1), ["image", "partner"]) as axes:
        for row, pair in zip(axes, chosen, strict=False):
            text = (f"{images.paths[pair.i]}\n{images.paths[pair.j]}\noverlap "
                    f"{pair.overlap:.2f}, r {pair.correlation:.2f}, shift {pair.shift}")
            _show(row[0], images.pixels[pair.i], text)
            _show(row[1], images.pixels[pair.j])


def plot_interventions(images, path: Path) -> None:
    """The first image of each class before and after each intervention. Local use only."""
    columns = {"as read": []} | {f"without {name}": [name] for name in INTERVENTIONS}
    with _grid(path, len(images.classes), list(columns)) as axes:
        for c, row in enumerate(axes):
            first = images.pixels[int((images.labels == c).nonzero()[0])][None].cpu()
            for axis, names in zip(row, columns.values(), strict=True):
                _show(axis, apply(first, names)[0], "" if names else images.classes[c])
