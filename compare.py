"""Several run folders → one table with paired tests, where the test images allow one.

    python compare.py runs/A runs/B            # Markdown on stdout; table and figure in --out
    python compare.py runs/A runs/B --paper    # beside the paper's Table 4, with its intervals

Runs that differ by their seed alone are one row, mean ± sd; a run of `--local-only` stands for all
of its clients.
"""

from checks import guard, make_parser

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from dataset import splits
from reporting import figures, finished, metrics, pages, report, run_folder, terminal

# Table 4 as published: hits and images that the accuracy implies (652 is the only size up to
# 1,000 that fits all three baselines), precision, recall, F1 as printed there, ROC AUC (section V).
PAPER = {f"paper: {name}, {hits}/{n}": {
    "n": n, "accuracy": metrics.wilson(hits, n), "roc_auc": auc,
    "weighted_precision": precision, "weighted_recall": recall, "weighted_f1": f1}
    for name, hits, n, precision, recall, f1, auc in (
        ("FedAvg + ResNet50", 323, 325, 0.9939, 0.9938, 0.9938, 0.9999),
        ("ResNet50 (centralised)", 641, 652, 0.98, 0.98, 0.98, None),
        ("VGG16", 635, 652, 0.97, 0.97, 0.97, None),
        ("EfficientNet-B0", 628, 652, 0.96, 0.96, 0.96, None))}
WHERE = ("seed", "like", "device", "data")  # arguments that make no other configuration
HEADER = ["run", "runs", "n", "accuracy", "macro P / R / F1", "weighted P / R / F1", "kappa", "AUC",
          "images seen", "seconds"]


@dataclass(frozen=True, eq=False)
class Run:
    """One trained network (or its pooled folds) and what it predicted on its test images."""
    label: str
    folder: Path
    seed: int
    site: str  # of --local-only
    configuration: str
    results: dict
    test: finished.Predictions
    units: tuple[str, np.ndarray] | None  # patient or group of each test image, where known

    def correct(self) -> np.ndarray:
        """bool [n], in the order of the paths."""
        return self.test.logits.argmax(1) == self.test.labels

    def images(self) -> tuple:
        """What must be equal for a paired test: the data and the test images."""
        return self.results["fingerprint"], tuple(self.test.paths)


def load(folder: Path, label: str | None = None, owned: list | None = None) -> list[Run]:
    """The runs that a folder stands for. InputError for no run, or one without predictions.
    owned: of a hospital alone, what says how the images were dealt."""
    run = run_folder.read_run(folder)
    arguments = run["arguments"]
    if label is None:
        own = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
        label = re.sub(r"-seeds?[\d-]+$", "", own)
    results = run_folder.read_json(folder / "results.json")
    if arguments.get("local_only") and "members" in results and "best" not in results:
        owned = [m["train"] for m in results["members"]] + [
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.glob("*/**/split.csv"))]
        return [r for m in results["members"]
                for r in load(folder / m["name"], f"{label}, one client alone", owned)]
    configuration = json.dumps([run["script"], owned, {k: v for k, v in sorted(arguments.items())
                                                if k not in WHERE}])
    site = folder.name if run.get("part_of") else ""
    test = finished.read_predictions(folder)
    return [Run(label, folder, run["seed"], site, configuration, results, test,
                finished.read_units(folder, test.paths))]


def group(several: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by label: those that differ by seed (or site) alone are one group, in order."""
    groups: dict[tuple, list[Run]] = {}
    for run in several:
        repeat = 0  # the same configuration, seed and site twice: two rows
        while any(r.seed == run.seed and (
                r.site == run.site or r.folder.parent != run.folder.parent)
                  for r in groups.get((run.configuration, run.images(), repeat), [])):
            repeat += 1
        groups.setdefault((run.configuration, run.images(), repeat), []).append(run)
    labels = [members[0].label for members in groups.values()]
    return {members[0].label if labels.count(members[0].label) == 1 else str(members[0].folder):
            members for members in groups.values()}


def summarise(members: list[Run]) -> dict:
    """The figures of a row: those of the run, or {"mean", "sd", "n"} over several."""
    tests = [r.results["best"]["test"] for r in members]
    one = len(members) == 1
    figures = {key: tests[0][key] if one else metrics.mean_sd([t[key] for t in tests])
               for key in metrics.FIGURES}
    cost = {key: float(np.mean([r.results[key] for r in members]))
            for key in ("images_seen", "seconds")}
    return {"runs": len(members), "n": len(members[0].test.paths),
            "seeds": sorted({r.seed for r in members}), **figures, **cost}


def table_rows(rows: dict[str, dict]) -> list[list]:
    out = []
    for label, row in rows.items():
        triples = [" / ".join(terminal.show(row.get(f"{kind}_{key}")) for key in
                              ("precision", "recall", "f1")) for kind in ("macro", "weighted")]
        cost = [f"{row[key]:.0f}" if key in row else "–" for key in ("images_seen", "seconds")]
        out.append([label, row.get("runs", "–"), row["n"], terminal.show(row["accuracy"]),
                    *("–" if set(t) <= set("– /") else t for t in triples),
                    terminal.show(row.get("kappa")), terminal.show(row.get("roc_auc")), *cost])
    return out


def colour_rows(groups: dict[str, list[Run]]) -> dict[str, dict]:
    """The colour-only classifiers, once per training and test part."""
    rows: dict[str, dict] = {}
    for label, members in groups.items():
        for row, *others in zip(*(r.results["colour_only"] for r in members), strict=True):
            name = f"no network: {row['features']}, {row['classifier']}, strip {row['strip']}"
            found = [one["test"] for one in (row, *others)]
            same = all(figure == found[0] for figure in found)
            figures = {"n": len(members[0].test.paths),
                       "accuracy": found[0] if same else metrics.mean_sd(found)}
            if figures not in (row for known, row in rows.items() if known.startswith(name)):
                rows[name if name not in rows else f"{name} ({label})"] = figures
    return rows


def paired_tests(groups: dict[str, list[Run]]) -> list[dict]:
    """Every pair of groups: difference and McNemar, or the reason why there is none."""
    out = []
    for (a, left), (b, right) in combinations(groups.items(), 2):
        pair = {"a": a, "b": b}
        one, two = left[0].images(), right[0].images()
        if one != two:
            common = len(set(one[1]) & set(two[1]))
            why = "another data set" if one[0] != two[0] else f"{common} of them in common"
            pair["refused"] = (f"{len(one[1])} and {len(two[1])} test images, {why}: not the same "
                               "images, so no paired test")
        else:
            correct = [np.mean([r.correct() for r in side], 0) for side in (left, right)]
            unit, names = next((r.units for r in (*left, *right) if r.units), ("image", None))
            numbers = None if names is None else splits.numbered(names)
            pair |= {"n": len(one[1]), "unit": unit,
                     "units": len(one[1] if names is None else np.unique(numbers)),
                     "difference": metrics.paired_difference(*correct, numbers, unit)}
            pair["mcnemar"] = [] if names is not None else [
                {"seed": x.seed, **metrics.mcnemar(x.correct(), y.correct())}
                for x in left for y in right if x.seed == y.seed]
        out.append(pair)
    return out


def test_rows(tests: list[dict]) -> list[list]:
    rows = []
    for t in (t for t in tests if "refused" not in t):
        d, m = t["difference"], t["mcnemar"]
        p = [x["p"] for x in m]
        only = f"{sum(x['a_only'] for x in m)} : {sum(x['b_only'] for x in m)}" if m else "–"
        shown = ", ".join(f"{x:.2g}" for x in p) if len(p) < 5 else \
            f"{min(p):.2g}–{max(p):.2g} ({len(p)} pairs)"
        interval = f"{d['value']:+.4f} " + (f"({d['low']:+.4f} … {d['high']:+.4f})"
                                            if d["reason"] is None else f"({d['reason']})")
        count = str(t["n"]) + ("" if t["unit"] == "image" else f", {t['units']} {t['unit']}s")
        rows.append([t["a"], t["b"], count, interval, only, shown or (
            "no common seed" if t["unit"] == "image" else f"images of a {t['unit']} are alike")])
    return rows


def page(rows: dict[str, dict], tests: list[dict]) -> str:
    """The comparison as Markdown."""
    text = "# Comparison\n\n" + pages.markdown(HEADER, table_rows(rows)) + (
        "\n\nBest model on validation, test part. One run: Wilson 95 % interval of the accuracy. "
        "Several runs: mean ± sd over them, cost per run. Intervals assume independent images; "
        "images of one patient are not, so they are too narrow.")
    if any(name.startswith("paper: ") for name in rows):
        text += (" Paper: Table 4, its averages unlabelled; test sizes are those that its figures "
                 "imply. It publishes no predictions: no paired test with it is possible.")
    if tested := test_rows(tests):
        text += "\n\n## The same test images, paired\n\n" + pages.markdown(
            ["A", "B", "n", "accuracy A − B (95 %, paired)",
             "right in A only : B only", "exact McNemar p, runs of one seed paired"], tested) + (
            "\n\nTwo single runs: Newcombe's interval. Several seeds: bootstrap over images. Where "
            "patients or groups are known: bootstrap over these, no McNemar test. All cover the "
            "choice of test images, not of seeds; nothing is corrected for the number of tests.")
    if refused := [f"- {t['a']} against {t['b']}: {t['refused']}" for t in tests if "refused" in t]:
        text += "\n\n## Not tested\n\n" + "\n".join(refused)
    return text


def curves(run: Run) -> dict[str, np.ndarray]:
    """Images passed in training, and validation loss and accuracy, after each round or epoch that
    validated: float [n] each. Of folds, the mean over them, as far as all of them went. Empty for a
    hospital with images of its own, whose history is the server's."""
    folders = sorted(run.folder.glob("fold*/history.jsonl")) or [run.folder / "history.jsonl"]
    several = []
    for path in filter(Path.exists, folders):
        history = finished.read_history(path.parent)
        passed = np.cumsum([r["images"] for r in history])
        several.append(np.array([[n, r["val_loss"], r["val_accuracy"]] for n, r in
                                 zip(passed, history, strict=True) if r["val_loss"] is not None]))
    length = min(map(len, several), default=0)
    means = np.mean([each[:length] for each in several] or [[]], 0).reshape(length, 3)
    return dict(zip(("images", "loss", "accuracy"), means.T, strict=True))


def plot_curves(groups: dict[str, list[Run]], path: Path) -> None:
    """Validation accuracy and loss over images passed, run by run: at which budget do they meet?"""
    with figures.drawing(path, 9, 3.6, columns=2) as axes:
        for i, (label, members) in enumerate(groups.items()):
            for j, run in enumerate(members):
                found = curves(run)
                for axis, key in zip(axes, ("accuracy", "loss"), strict=True):
                    axis.plot(found["images"], found[key], "-o", ms=2, lw=1, color=f"C{i % 10}",
                              label=label if j == 0 else None)
                    axis.set(xlabel="images passed in training", ylabel=f"validation {key}")
                    axis.locator_params(axis="x", nbins=5)  # long numbers, side by side
        axes[0].legend(fontsize=6)


def plot(rows: dict[str, dict], groups: dict[str, list[Run]], path: Path) -> None:
    """Accuracies with their intervals, row by row; the best of colour alone is a dashed line."""
    def middle(label):
        return rows[label]["accuracy"].get("value", rows[label]["accuracy"].get("mean"))
    words = {label: f"{label} ({terminal.show(row['accuracy'])})" for label, row in rows.items()}
    shown = [label for label in rows if not label.startswith("no network: ")]
    colour = [label for label in rows if label not in shown and middle(label) is not None]
    note = "accuracy: 95 % interval; of several runs each and their mean"
    with figures.drawing(path, 7, 0.3 * len(shown) + 1) as axis:
        for y, label in enumerate(shown):
            accuracy, color = rows[label]["accuracy"], "tab:blue" if label in groups else "grey"
            if middle(label) is None:
                continue
            if "mean" in accuracy:
                values = [r.results["best"]["test"]["accuracy"]["value"] for r in groups[label]]
                axis.plot(values, [y] * len(values), "o", ms=3, mfc="none", color=color)
            else:
                axis.plot([accuracy["low"], accuracy["high"]], [y, y], color=color)
            axis.plot(middle(label), y, "d", color=color)
        if colour:
            best = max(colour, key=middle)
            axis.axvline(middle(best), ls="--", lw=1, color="grey")
            note += f"\ndashed, the best of {len(colour)} on these images: {words[best]}"
        axis.set_yticks(range(len(shown)), [words[label] for label in shown], fontsize=7)
        axis.set_xlabel(note, fontsize=7)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--paper", action="store_true", help="add the paper's Table 4")
    parser.add_argument("--out", metavar="DIR", help="default: runs/comparison, numbered if taken")
    args = parser.parse_args(argv)
    groups = group([run for folder in args.runs for run in load(Path(folder))])
    with run_folder.made(args.out, "runs/comparison") as folder:
        rows = {label: summarise(members) for label, members in groups.items()}
        rows |= colour_rows(groups) | (PAPER if args.paper else {})
        tests = paired_tests(groups)
        text = page(rows, tests)
        run_folder.write_json(folder / "comparison.json", {"rows": rows, "tests": tests})
        run_folder.write_text(folder / "comparison.md",
                              text + "\n\n![comparison](comparison.png)\n\n![curves](curves.png)\n")
        with report.decoration(f"{folder}/comparison.json"):
            plot(rows, groups, folder / "comparison.png")
            plot_curves(groups, folder / "curves.png")
    print(f"{text}\n\ntable and figures: {folder}/comparison.md, comparison.png, curves.png")


if __name__ == "__main__":
    guard(main)
