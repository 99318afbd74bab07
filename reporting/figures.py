"""Every figure (PNG): curves, matrices and bars; grids of images for explanations and audits."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax
from sklearn.metrics import roc_curve

from dataset.interventions import INTERVENTIONS, apply

ROWS = 8  # of one page


# ---- of a run and of an audit: curves, matrices, bars ------------------------------------------

def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")


def plot_history(history: list[dict], best_round: int, path: Path, unit: str = "round") -> None:
    """The paper's Fig. 3: training and validation, loss and accuracy, against rounds."""
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots(1, 2)
    rounds = [record[unit] for record in history]
    for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
        axis.plot(rounds, [r[f"train_{key}"] for r in history], "o-", ms=3,
                  label="training (augmented batches)")
        val = [(r[unit], r[f"val_{key}"]) for r in history if r[f"val_{key}"] is not None]
        if val:
            axis.plot(*zip(*val, strict=True), "s-", ms=3, label="validation")
        axis.axvline(best_round, color="grey", lw=0.8, ls="--", label=f"best {unit}")
        axis.set(xlabel=unit, ylabel=key)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _save(figure, path)


def plot_curves(histories: list[list[dict]], path: Path) -> None:
    """Mean training and validation curves over folds or sites, shaded by ± one sd.

    Where early stopping ends some of them sooner, the mean is over those that go on.
    """
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots(1, 2)
    for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
        for part, name in (("train", "training (augmented batches)"), ("val", "validation")):
            by_epoch: dict[int, list[float]] = {}
            for record in (r for history in histories for r in history):
                if record[f"{part}_{key}"] is not None:
                    by_epoch.setdefault(record["epoch"], []).append(record[f"{part}_{key}"])
            epochs = sorted(by_epoch)
            mean = np.array([np.mean(by_epoch[e]) for e in epochs])
            sd = np.array([np.std(by_epoch[e], ddof=1) if len(by_epoch[e]) > 1 else 0
                           for e in epochs])
            line, = axis.plot(epochs, mean, "o-", ms=2, label=f"{name}, mean of {len(histories)}")
            axis.fill_between(epochs, mean - sd, mean + sd, alpha=0.2, color=line.get_color())
        axis.set(xlabel="epoch", ylabel=key)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, title="shaded: ± sd", title_fontsize=8)
    _save(figure, path)


def plot_confusion(confusion: list[list[int]], classes: list[str], title: str, path: Path) -> None:
    """Counts, shaded by the share of the true class."""
    counts = np.array(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(3.6, 0.8 * len(classes))
    figure = Figure(figsize=(size, size))
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        axis.text(j, i, str(count), ha="center", va="center",
                  color="white" if share[i, j] > 0.5 else "black")
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=30, ha="right")
    axis.set_yticks(ticks, classes)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    _save(figure, path)


def plot_roc(logits: np.ndarray, labels: np.ndarray, classes: list[str], per_class: dict,
             path: Path) -> None:
    """One-against-rest ROC curve of each class present."""
    p = softmax(logits.astype(np.float64), axis=1)
    figure = Figure(figsize=(4.4, 4))
    axis = figure.subplots()
    for c, name in enumerate(classes):
        auc = per_class[name]["auc"]
        if auc is not None:
            false_rate, true_rate, _ = roc_curve(labels == c, p[:, c])
            axis.plot(false_rate, true_rate, label=f"{name}, AUC {auc:.4f}")
    axis.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", title="one against rest, test")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def plot_probes(rows: dict[str, dict], chance: float, path: Path) -> None:
    """Accuracy of each shortcut probe with its interval, by way of splitting."""
    figure = Figure(figsize=(7, 0.6 * len(rows) + 1.2))
    axis = figure.subplots()
    names = list(next(iter(rows.values())))
    for k, name in enumerate(names):
        found = [(i, row[name]) for i, row in enumerate(rows.values())]
        values = np.array([m["value"] for _, m in found])
        errors = [values - [m["low"] for _, m in found], [m["high"] for _, m in found] - values]
        axis.errorbar(values, [i + 0.18 * k for i, _ in found], xerr=errors, fmt="o", ms=4,
                      label=name)
    axis.axvline(chance, color="grey", ls="--", lw=0.8, label="largest class")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set(xlabel="accuracy", xlim=(0, 1.02))
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_seeds(seeds: dict, path: Path) -> None:
    """Accuracy of one probe over random split seeds, seed 42 marked."""
    figure = Figure(figsize=(5, 3))
    axis = figure.subplots()
    axis.hist(seeds["values"], bins=20)
    axis.axvline(seeds["seed_42"], color="C3", label="seed 42")
    axis.set(xlabel="accuracy, nearest neighbour on colour statistics", ylabel="split seeds")
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_reliability(p: np.ndarray, labels: np.ndarray, path: Path, bins: int = 10) -> None:
    """Accuracy against confidence of the top class, marker area by number of images."""
    confidence, correct = p.max(1), p.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    used = np.unique(place)
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    axis.scatter([confidence[place == b].mean() for b in used],
                 [correct[place == b].mean() for b in used],
                 s=[20 + 200 * (place == b).mean() for b in used])
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02),
             title=f"n = {len(labels)}")
    _save(figure, path)


def plot_clients(labels: np.ndarray, clients: list[np.ndarray], classes: list[str],
                 path: Path) -> None:
    """Client × class counts of the training part."""
    counts = np.stack([np.bincount(labels[c], minlength=len(classes)) for c in clients])
    figure = Figure(figsize=(5.5, max(1.8, 0.4 * len(clients) + 1)))
    axis = figure.subplots()
    left = np.zeros(len(clients))
    for c, name in enumerate(classes):
        axis.barh(range(len(clients)), counts[:, c], left=left, label=name)
        left += counts[:, c]
    axis.set(xlabel="training images", ylabel="client")
    axis.set_yticks(range(len(clients)))
    axis.invert_yaxis()
    axis.legend(fontsize=8, ncols=len(classes), loc="lower center", bbox_to_anchor=(0.5, 1))
    _save(figure, path)


# ---- grids of images ---------------------------------------------------------------------------

def scale(values: np.ndarray) -> float:
    """The magnitude that is drawn at full colour: the 99th percentile, so that one pixel does not
    darken the rest."""
    return float(np.percentile(np.abs(values), 99)) or float(np.abs(values).max()) or 1.0


def _image(subject) -> np.ndarray:
    return subject.pixels.permute(1, 2, 0).numpy()


def _words(subject, target: int, classes: list[str]) -> str:
    truth = "" if subject.truth is None else f", truth {classes[subject.truth]}"
    return (f"{subject.path.rsplit('/', 1)[-1]}\npredicted {classes[subject.p.argmax()]} "
            f"{subject.p.max():.3f}{truth}\nexplained: {classes[target]} {subject.p[target]:.3f}")


def _grid(rows: int, columns: int, titles: list[str]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(2.1 * columns + 2.4, 2.1 * rows + 0.3))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    return figure, axes


def _name_row(axis, text: str) -> None:
    axis.set_ylabel(text, fontsize=7, rotation=0, ha="right", va="center")


def draw_map(axis, values: np.ndarray, alpha: float = 1.0) -> None:
    """Magnitudes in one colour; red for and blue against where a map has a sign."""
    top = scale(values)
    if values.min() < 0:
        axis.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, alpha=alpha)
    else:
        axis.imshow(values, cmap="inferno", vmin=0, vmax=top, alpha=alpha)


def plot_maps(entries: list[tuple], method: str, classes: list[str], path: Path) -> None:
    """Fig. 5: a row per image and class. entries: (subject, class, map)."""
    figure, axes = _grid(len(entries), 3, ["image", method, "overlay"])
    for row, (subject, target, values) in zip(axes, entries, strict=True):
        _name_row(row[0], _words(subject, target, classes))
        row[0].imshow(_image(subject))
        draw_map(row[1], values)
        row[2].imshow(_image(subject))
        draw_map(row[2], values, alpha=0.5)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def plot_lime(entries: list[tuple], classes: list[str], path: Path, top: int = 5) -> None:
    """Fig. 6: `top` superpixels for and against. entries: (subject, class, segments, weights)."""
    figure, axes = _grid(len(entries), 4, ["image", "for", "against", "weights"])
    for row, (subject, target, segments, weights) in zip(axes, entries, strict=True):
        _name_row(row[0], _words(subject, target, classes))
        row[0].imshow(_image(subject))
        order = np.argsort(weights)
        for axis, chosen in ((row[1], [s for s in order[::-1][:top] if weights[s] > 0]),
                             (row[2], [s for s in order[:top] if weights[s] < 0])):
            shown = np.isin(segments, chosen)
            axis.imshow(np.where(shown[..., None], _image(subject), _image(subject) // 4))
            if chosen:
                axis.contour(shown, levels=[0.5], colors="yellow", linewidths=0.8)
        draw_map(row[3], weights[segments])
    figure.savefig(path, dpi=100, bbox_inches="tight")


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
    chosen = sorted(pairs, key=lambda p: p.correlation)[::max(1, len(pairs) // count)][:count]
    figure, axes = _grid(max(len(chosen), 1), 2, ["image", "partner"])
    for row, pair in zip(axes, chosen, strict=False):
        for axis, i in zip(row, (pair.i, pair.j), strict=True):
            axis.imshow(images.pixels[i].permute(1, 2, 0).cpu().numpy())
        _name_row(row[0], f"{images.paths[pair.i]}\n{images.paths[pair.j]}\noverlap "
                  f"{pair.overlap:.2f}, r {pair.correlation:.2f}, shift {pair.shift}")
    figure.savefig(path, dpi=100, bbox_inches="tight")


def plot_interventions(images, path: Path) -> None:
    """The first image of each class before and after each intervention. Local use only."""
    columns = {"as read": []} | {f"without {name}": [name] for name in INTERVENTIONS}
    figure, axes = _grid(len(images.classes), len(columns), list(columns))
    for c, row in enumerate(axes):
        first = images.pixels[int((images.labels == c).nonzero()[0])][None].cpu()
        for axis, names in zip(row, columns.values(), strict=True):
            axis.imshow(apply(first, names)[0].permute(1, 2, 0).numpy())
        _name_row(row[0], images.classes[c])
    figure.savefig(path, dpi=100, bbox_inches="tight")
