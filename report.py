"""A run folder made readable: the figures (PNG) and `report.md`, from what the run wrote there."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax
from sklearn.metrics import roc_curve


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


# ---- words ------------------------------------------------------------------------------------

def show(figure: dict | float | None, digits: int = 4) -> str:
    """A number, or {"value", "low", "high"} as `0.9938 (0.9778–0.9983)`; None as a dash."""
    if isinstance(figure, dict):
        if figure["value"] is None:
            return "–"
        return f"{show(figure['value'])} ({show(figure['low'])}–{show(figure['high'])})"
    return "–" if figure is None else f"{figure:.{digits}f}"


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def summary_rows(results: dict, unit: str = "round") -> list[list]:
    """Rows model × part: n, loss, accuracy with interval, macro F1, κ, AUC."""
    rows = []
    for which in ("best", "last"):
        for part in ("val", "test"):
            m = results[which][part]
            if m is None:  # trained without a validation part
                continue
            rows.append([f"{which} ({unit} {results[which][unit]})", part, m["n"], show(m["loss"]),
                         show(m["accuracy"]), show(m["macro_f1"]), show(m["kappa"]),
                         show(m["roc_auc"])])
    return rows


SUMMARY = ["model", "part", "n", "loss", "accuracy (95 %)", "macro F1", "kappa", "AUC"]


def best_colour_row(results: dict, kind: str) -> dict:
    """The classifier on colour `kind` (means, statistics) that is best on validation; the first of
    the list where nothing validates."""
    rows = [row for row in results["colour_only"] if row["features"] == kind]
    return max(rows, key=lambda row: row["val"]["value"] or 0)


def colour_rows(results: dict) -> list[list]:
    return [[f"{row['features']}, {row['classifier']}, strip {row['strip']}",
             show(row["val"]), show(row["test"])] for row in results["colour_only"]]


def print_table(header: list[str], rows: list[list]) -> None:
    """Aligned columns on stdout."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(str(x).ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())


def print_summary(results: dict, unit: str = "round") -> None:
    """The table at the end of a run."""
    print_table(SUMMARY, summary_rows(results, unit))
    print_colour(results)


def print_colour(results: dict) -> None:
    for kind in ("means", "statistics"):
        top = best_colour_row(results, kind)
        print(f"colour {kind} alone ({top['classifier']}, strip {top['strip']}): validation "
              f"{show(top['val'])}, test {show(top['test'])}")


def show_mean(figure: dict) -> str:
    """{"mean", "sd", "n"} as `0.9815 ± 0.0031`."""
    if figure["mean"] is None:
        return "–"
    return show(figure["mean"]) + ("" if figure["sd"] is None else f" ± {show(figure['sd'])}")


MEMBERS = ["part", "training images", "best epoch", "n", "accuracy (95 %)", "macro F1", "kappa",
           "AUC"]


def member_rows(results: dict) -> list[list]:
    """A row per fold or site, then their mean ± sd, then the pooled predictions if there are."""
    keys = ("accuracy", "macro_f1", "kappa", "roc_auc")
    rows = [[m["name"], m["train"], m["epoch"], m["n"], *(show(m[key]) for key in keys)]
            for m in results["members"]]
    rows.append([f"mean ± sd of {len(rows)}", "", "", "",
                 *(show_mean(results["mean"][key]) for key in keys)])
    if "best" in results:
        m = results["best"]["test"]
        rows.append(["pooled, out of fold", "", "", m["n"], *(show(m[key]) for key in keys)])
    return rows


def print_pooled(results: dict) -> None:
    """The table at the end of a run of folds or sites."""
    print_table(MEMBERS, member_rows(results))
    if "colour_only" in results:
        print_colour(results)


CLIENTS = ["client", "n", "accuracy (95 %)", "macro F1"]


def client_rows(figures: dict, names: list[str] | None = None) -> list[list]:
    return [[name, 0, "–", "–"] if m is None else
            [name, m["n"], show(m["accuracy"]), show(m["macro_f1"])]
            for name, m in zip(names or range(len(figures["clients"])), figures["clients"],
                               strict=True)]


def client_table(figures: dict) -> str:
    """Each client on its own share, where there is no single global model (FedBN)."""
    if "clients" not in figures:
        return ""
    return ("### Each client on its own share of the test part (own BatchNorm)\n\n"
            + markdown(CLIENTS, client_rows(figures)))


def print_sites(results: dict) -> None:
    """The tables at the end of a run over sites with their own data."""
    print_table(SUMMARY, summary_rows(results))
    print_table(["site", *CLIENTS[1:]], client_rows(results["best"]["test"], results["sites"]))


MODEL_CARD = """## Model card

- **Intended use**: research and teaching. Not a medical device; not for diagnosis.
- **Data**: {data}. Fingerprint `{fingerprint}`.
- **Level of the split**: images, `{split}`, split seed {split_seed}. {level}
- **Known leaks**: {twins} of {n} test images have an identical twin in the training part; {leaks}
- **Intervals** assume independent images. {intervals}
- **Privacy**: one process, no secure aggregation, no differential privacy: nothing is claimed.
- **Limits**: one seed unless several are reported; colour alone reaches {colour} on the same test
  images (table above): a figure not well above it says nothing about cells.
"""

REAL = {"level": "The public ALL set has no patient or slide ids: a patient-level split is "
                 "impossible, and images of one patient stand on both sides.",
        "leaks": "near-duplicates, overlapping fields of view, class-tied scale bars and stain are "
                 "not removed.",
        "intervals": "With about 37 images a patient (89 patients, 3,256 images) they are too "
                     "narrow for the ALL set."}
SYNTHETIC = {"level": "Each picture is drawn independently.",
             "leaks": "none else by construction.", "intervals": "Here that holds."}


def head(folder: Path, run: dict, results: dict) -> str:
    """Title, command and cost."""
    loud = "**SYNTHETIC DATA: drawn, not medical. Figures show that the code works, no more.**\n\n"
    return (
        f"# {folder.name}\n\n{loud if run['synthetic'] else ''}"
        f"`python {run['script']} {' '.join(run['argv'])}`\n\n"
        f"{run['images']} images of {run['data']}; {results['images_seen']} training passes in "
        f"{results['optimizer_steps']} optimiser steps, {results['seconds']:.0f} s on "
        f"{run['machine']['device']} ({run['machine']['name']}, {run['machine']['threads']} "
        f"threads), torch {run['machine']['torch']}, commit {run['git']}.")


def class_table(test: dict, title: str) -> str:
    """Per class, and malignant against benign."""
    rows = [[name, *(show(m[k]) for k in ("precision", "recall", "specificity", "f1", "auc")),
             m["support"]] for name, m in test["per_class"].items()]
    text = f"### Per class ({title})\n\n" + markdown(
        ["class", "precision", "recall", "specificity", "F1", "AUC", "support"], rows)
    if test["malignant"] is not None:
        text += (f"\n\nMalignant against benign: sensitivity "
                 f"{show(test['malignant']['sensitivity'])}, specificity "
                 f"{show(test['malignant']['specificity'])}. ECE {show(test['ece'])}, Brier "
                 f"{show(test['brier'])}.")
    return text


def colour_table(results: dict) -> str:
    return ("### What colour alone reaches\n\nNo network: classifiers on whole-image colour.\n\n"
            + markdown(["statistics", "validation", "test"], colour_rows(results)))


def tail(folder: Path, run: dict, twins: int, n: int, colour: str) -> str:
    """Figures, settings and model card."""
    figures = "\n\n".join(f"![{p.stem}]({p.name})" for p in sorted(folder.glob("*.png")))
    settings = [[k, v] for k, v in run["arguments"].items()
                if v is not None and v is not False]  # a zero is a setting
    card = MODEL_CARD.format(
        data=f"{run['data']}, {run['images']} images, classes {', '.join(run['classes'])}",
        fingerprint=run["fingerprint"][:16], split=run["arguments"]["split"], twins=twins,
        split_seed=run["arguments"]["split_seed"], n=n, colour=colour,
        **(SYNTHETIC if run["synthetic"] else REAL))
    return (f"## Figures\n\n{figures}\n\n## Settings\n\n"
            f"{markdown(['argument', 'value'], settings)}\n\n{card}")


def report_page(folder: Path, run: dict, results: dict, twins: int) -> str:
    """`report.md` of one trained network: tables and figures, ending with the model card."""
    test = results["best"]["test"]
    unit = "round" if "round" in results["best"] else "epoch"
    chosen = ("Best = lowest validation loss, the earliest on ties; the test part was touched "
              "after training only." if results["best"]["val"] else
              "No validation part: the last epoch is scored.")
    sections = [
        head(folder, run, results),
        f"## Results\n\n{chosen}\n\n{markdown(SUMMARY, summary_rows(results, unit))}",
        class_table(test, "best model, test"), client_table(test), colour_table(results),
        tail(folder, run, twins, test["n"],
             show(best_colour_row(results, "statistics")["test"]))]
    return "\n\n".join(s for s in sections if s)


def pooled_page(folder: Path, run: dict, results: dict, twins: int) -> str:
    """`report.md` of a run of folds, or of single sites."""
    sections = [head(folder, run, results), "## Results", markdown(MEMBERS, member_rows(results)),
                "Each row is a run in the folder of that name, with a report of its own."]
    n = sum(m["n"] for m in results["members"])
    colour = "what the report of each part says"
    if "best" in results:
        sections += [("The standard deviation over folds is no standard error: training parts "
                      "overlap. The interval is that of the pooled predictions."),
                     class_table(results["best"]["test"], "pooled, out of fold"),
                     colour_table(results)]
        colour = show(best_colour_row(results, "statistics")["test"])
    return "\n\n".join([*sections, tail(folder, run, twins, n, colour)])


def sites_page(folder: Path, run: dict, results: dict) -> str:
    """`report.md` of a run over sites with their own data: pooled counts, a row per site."""
    settings = [[k, v] for k, v in run["arguments"].items() if v is not None and v is not False]
    return "\n\n".join([
        f"# {folder.name}",
        (f"Sites: {', '.join(results['sites'])}. {results['images_seen']} training passes in "
         f"{results['optimizer_steps']} optimiser steps, commit {run['git']}."),
        "## Results", "Best = lowest validation loss pooled over sites, the earliest on ties.",
        markdown(SUMMARY, summary_rows(results)),
        "### Each site on its own test part (best model)",
        markdown(["site", *CLIENTS[1:]], client_rows(results["best"]["test"], results["sites"])),
        class_table(results["best"]["test"], "best model, test parts of all sites"),
        ("Intervals assume independent images. Each site's predictions stay in its own folder; "
         "what crossed between sites, and what that does not protect, stands in SECURITY.md. "
         "Research and teaching only, not a medical device."),
        "## Figures", *(f"![{p.stem}]({p.name})" for p in sorted(folder.glob("*.png"))),
        "## Settings", markdown(["argument", "value"], settings)]) + "\n"
