"""Grids of images as PNG: the paper's Fig. 5 and Fig. 6, near duplicates, interventions."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import interventions

ROWS = 8  # of one page


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
    columns = {"as read": [], "--mask-corner": ["mask_corner"], "--grey-world": ["grey_world"]}
    figure, axes = _grid(len(images.classes), len(columns), list(columns))
    for c, row in enumerate(axes):
        first = images.pixels[int((images.labels == c).nonzero()[0])][None].cpu()
        for axis, names in zip(row, columns.values(), strict=True):
            axis.imshow(interventions.apply(first, names)[0].permute(1, 2, 0).numpy())
        _name_row(row[0], images.classes[c])
    figure.savefig(path, dpi=100, bbox_inches="tight")
