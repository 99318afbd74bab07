"""A run folder made readable: `report.md` and the tables on the terminal, from what is there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np

from checks import warn
from data import Images
from dataset.files import CLASSES
from dataset.splits import Split, count_twins
from reporting import figures
from reporting.baselines import colour_only
from reporting.run_folder import read_run, write_json, write_text


def show(figure: dict | float | None, digits: int = 4) -> str:
    """A number; {"value", "low", "high"} as `0.9938 (0.9778–0.9983)`, {"mean", "sd", "n"} as
    `0.9815 ± 0.0031`; None as a dash."""
    if not isinstance(figure, dict):
        return "–" if figure is None else f"{figure:.{digits}f}"
    if figure.get("value", figure.get("mean")) is None:
        return "–"
    if "mean" in figure:
        return show(figure["mean"]) + ("" if figure["sd"] is None else f" ± {show(figure['sd'])}")
    return f"{show(figure['value'])} ({show(figure['low'])}–{show(figure['high'])})"


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(x).replace("|", "\\|").split())
                                       for x in line) + " |" for line in lines)


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


def print_table(header: list[str], rows: list[list]) -> None:
    """Aligned columns on stdout."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(str(x).ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())


def print_epoch(record: dict, total: int, unit: str = "epoch") -> None:
    """The line of an epoch, or of a round; null figures are dashes."""
    print(f"{unit} {record[unit]}/{total}: train loss {show(record['train_loss'])}, val loss "
          f"{show(record['val_loss'])}, val accuracy {show(record['val_accuracy'])}, lr "
          f"{record['lr']:g}, {record['images_per_second']:.1f} images/s", flush=True)


def print_round(record: dict, rounds: int) -> None:
    """A line for each client of the round, then one for the round."""
    for c in record["clients"]:
        norm = "not finite, left out" if c["left_out"] else show(c["update_norm"], 3)
        name = c.get("site", f"client {c['client']}")
        print(f"  {name}: {c['num_examples']} images, "
              f"{c['steps']} steps, loss {show(c['loss'])}, accuracy {show(c['accuracy'], 3)}, "
              f"update norm {norm}, skipped {show(c['skipped_steps'], 0)}")
    print_epoch(record, rounds, "round")


def print_summary(folder: Path, results: dict) -> None:
    """The table at the end of a run."""
    print_table(SUMMARY, summary_rows(results, "round" if "round" in results["best"] else "epoch"))
    print_colour(results)
    print_place(folder)


def print_place(folder: Path) -> None:
    """Where the report stands, if it could be written."""
    if (folder / "report.md").exists():
        print(f"report: {folder}/report.md")


def print_colour(results: dict) -> None:
    for kind in ("means", "statistics"):
        top = best_colour_row(results, kind)
        print(f"colour {kind} alone ({top['classifier']}, strip {top['strip']}): validation "
              f"{show(top['val'])}, test {show(top['test'])}")


MEMBERS = ["part", "training images", "best epoch", "n", "accuracy (95 %)", "macro F1", "kappa",
           "AUC"]


def member_rows(results: dict) -> list[list]:
    """A row per fold or site, then their mean ± sd, then the pooled predictions if there are."""
    keys = ("accuracy", "macro_f1", "kappa", "roc_auc")
    rows = [[m["name"], m["train"], m["epoch"], m["n"], *(show(m[key]) for key in keys)]
            for m in results["members"]]
    rows.append([f"mean ± sd of {len(rows)}", "", "", "",
                 *(show(results["mean"][key]) for key in keys)])
    if "best" in results:
        m = results["best"]["test"]
        rows.append(["pooled, out of fold", "", "", m["n"], *(show(m[key]) for key in keys)])
    return rows


def client_rows(clients: list[dict | None], names: Iterable) -> list[list]:
    """A row for each client or hospital: its name, n, accuracy, macro F1."""
    return [[name, 0, "–", "–"] if m is None else
            [name, m["n"], show(m["accuracy"]), show(m["macro_f1"])]
            for name, m in zip(names, clients, strict=False)]


CLIENTS = ["n", "accuracy (95 %)", "macro F1"]


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

OWN = {"level": "What is not known of the images, such as patients, cannot be kept apart.",
       "leaks": "near-duplicates and shortcuts are not looked for here: audit.py does.",
       "intervals": "Where several images come from one patient they are too narrow."}
ALL_SET = {"level": "The public ALL set has no patient or slide ids: a patient-level split is "
                 "impossible, and images of one patient stand on both sides.",
        "leaks": "near-duplicates, overlapping fields of view, class-tied scale bars and stain are "
                 "not removed.",
        "intervals": "With about 37 images a patient (89 patients, 3,256 images) they are too "
                     "narrow for the ALL set."}
SYNTHETIC = {"level": "Each picture is drawn independently.",
             "leaks": "none else by construction.", "intervals": "Here that holds."}


def is_all_set(run: dict) -> bool:
    """Whether a run's images are one of the two public sets of acute lymphoblastic leukaemia."""
    return run["classes"] == list(CLASSES) and run["images"] in (3256, 3242)


def head(folder: Path, run: dict, results: dict) -> str:
    """Title, command and cost."""
    loud = "**SYNTHETIC DATA: drawn, not medical. Figures show that the code works, no more.**\n\n"
    return (
        f"# {folder.name}\n\n{loud if run['synthetic'] else ''}"
        f"`python {run['script']} {' '.join(run['argv'])}`\n\n"
        f"{run['images']} images of {run['data']}; {results['images_seen']} training passes in "
        f"{results['optimizer_steps']} optimiser steps, {results['seconds']:.0f} s on "
        f"{run['machine']['device']} ({run['machine']['name']}, {run['machine']['threads']} "
        f"threads), torch {run['machine']['torch']}, commit {run['git']}."
        + (f" Passed over: {run['ignored_files']}." if run["ignored_files"] else ""))


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
    rows = [[f"{row['features']}, {row['classifier']}, strip {row['strip']}", show(row["val"]),
             show(row["test"])] for row in results["colour_only"]]
    return ("### What colour alone reaches\n\nNo network: classifiers on whole-image colour.\n\n"
            + markdown(["statistics", "validation", "test"], rows))


def figures_and_settings(folder: Path, run: dict) -> str:
    """Every figure of the folder, and every argument that is set."""
    drawn = "\n\n".join(f"![{p.stem}]({p.name})" for p in sorted(folder.glob("*.png")))
    settings = [[k, v] for k, v in run["arguments"].items()
                if v is not None and v is not False]  # a zero is a setting
    return f"## Figures\n\n{drawn}\n\n## Settings\n\n{markdown(['argument', 'value'], settings)}"


def tail(folder: Path, run: dict, twins: int, n: int, colour: str) -> str:
    """Figures, settings and model card."""
    card = MODEL_CARD.format(
        data=f"{run['data']}, {run['images']} images, classes {', '.join(run['classes'])}",
        fingerprint=run["fingerprint"][:16], split=run["arguments"]["split"], twins=twins,
        split_seed=run["arguments"]["split_seed"], n=n, colour=colour,
        **(SYNTHETIC if run["synthetic"] else ALL_SET if is_all_set(run) else OWN))
    return f"{figures_and_settings(folder, run)}\n\n{card}"


def write_page(folder: Path, sections: list[str]) -> None:
    """report.md of these sections; empty ones are left out."""
    write_text(folder / "report.md", "\n\n".join(s for s in sections if s).rstrip() + "\n")


def write_run(folder: Path, results: dict, history: list[dict], images: Images, split: Split,
              logits: np.ndarray, clients: list[np.ndarray] | None) -> dict:
    """Figures, report.md and results.json of one trained network; returns what the latter holds.
    logits: float32 [n, C] of the best model on the test part. Adds what colour alone reaches."""
    results = results | {"colour_only": colour_only(images, split)}
    write_json(folder / "results.json", results)  # first: nothing below may end a run
    with decoration():
        draw_run(folder, results, history, images, split, logits, clients)
    return results


@contextmanager
def decoration(file: str = "results.json") -> Iterator[None]:
    """Around all that only decorates a result: where it fails, one line says so and work goes on.
    file: where the figures stand, written before."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a figure or a table can raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn(f"WARNING: the report is not complete ({reason}); every figure stands in {file}")


def draw_run(folder: Path, results: dict, history: list[dict], images: Images, split: Split,
             logits: np.ndarray, clients: list[np.ndarray] | None) -> None:
    """The figures and report.md of `write_run`."""
    best, labels = results["best"], images.labels.numpy()
    test, unit = best["test"], "round" if "round" in best else "epoch"
    figures.plot_curves([history], folder / "history.png", unit, best[unit])
    figures.plot_confusion(test["confusion"], images.classes, "best model, test",
                           folder / "confusion.png")
    figures.plot_roc(logits, labels[split["test"]], images.classes, test["per_class"],
                     folder / "roc.png")
    if clients is not None:
        figures.plot_clients(labels, clients, images.classes, folder / "clients.png")
    chosen = ("Best = lowest validation loss, the earliest on ties; the test part was touched "
              "after training only." if best["val"] else
              "No validation part: the last epoch is scored.")
    run, twins = read_run(folder), count_twins(images.digests, split["test"], split["train"])
    shares = []  # FedBN only
    if "clients" in test:
        shares = ["### Each client on its own share of the test part (own BatchNorm)",
                  markdown(["client", *CLIENTS], client_rows(test["clients"], count()))]
    write_page(folder, [
        head(folder, run, results),
        f"## Results\n\n{chosen}\n\n{markdown(SUMMARY, summary_rows(results, unit))}",
        class_table(test, "best model, test"),
        *shares, colour_table(results),
        tail(folder, run, twins, test["n"],
             show(best_colour_row(results, "statistics")["test"]))])


def write_pooled(folder: Path, results: dict, histories: list[list[dict]], twins: int,
                 drawn: tuple[np.ndarray, np.ndarray] | None) -> None:
    """results.json, figures and report.md of a run of folds, or of hospitals alone; the table on
    the terminal. drawn: logits [n, C] and labels [n] of the pooled test parts, where disjoint."""
    write_json(folder / "results.json", results)  # first: nothing below may end a run
    print_table(MEMBERS, member_rows(results))
    if drawn is not None:
        print_colour(results)
    with decoration():
        draw_pooled(folder, results, histories, twins, drawn)
    print_place(folder)


def draw_pooled(folder: Path, results: dict, histories: list[list[dict]], twins: int,
                drawn: tuple[np.ndarray, np.ndarray] | None) -> None:
    """The figures and report.md of `write_pooled`."""
    figures.plot_curves(histories, folder / "curves.png")
    run, colour = read_run(folder), "what the report of each part says"
    sections = [head(folder, run, results), "## Results", markdown(MEMBERS, member_rows(results)),
                "Each row is a run in the folder of that name, with a report of its own."]
    if drawn is not None:
        test = results["best"]["test"]
        figures.plot_confusion(test["confusion"], run["classes"], "out of fold",
                               folder / "confusion.png")
        figures.plot_roc(*drawn, run["classes"], test["per_class"], folder / "roc.png")
        sections += [("The standard deviation over folds is no standard error: training parts "
                      "overlap. The interval is that of the pooled predictions."),
                     class_table(test, "pooled, out of fold"), colour_table(results)]
        colour = show(best_colour_row(results, "statistics")["test"])
    n = sum(m["n"] for m in results["members"])
    write_page(folder, [*sections, tail(folder, run, twins, n, colour)])


def write_sites(folder: Path, results: dict, history: list[dict], classes: list[str]) -> None:
    """results.json, figures, report.md and the tables on the terminal of hospitals with images of
    their own: pooled counts, and a row for each hospital."""
    write_json(folder / "results.json", results)  # first: nothing below may end a run
    print_table(SUMMARY, summary_rows(results))
    header = ["site", *CLIENTS]
    rows = client_rows(results["best"]["test"]["clients"], results["sites"])
    print_table(header, rows)
    with decoration():
        draw_sites(folder, results, history, classes, markdown(header, rows))
    print_place(folder)


def draw_sites(folder: Path, results: dict, history: list[dict], classes: list[str],
               table: str) -> None:
    """The figures and report.md of `write_sites`. table: Markdown, a row for each hospital."""
    test, run = results["best"]["test"], read_run(folder)
    figures.plot_curves([history], folder / "history.png", "round", results["best"]["round"])
    figures.plot_confusion(test["confusion"], classes, "best model, test parts of all sites",
                           folder / "confusion.png")
    write_page(folder, [
        f"# {folder.name}",
        (f"Sites: {results['data']}. {results['images_seen']} training passes in "
         f"{results['optimizer_steps']} optimiser steps, commit {run['git']}."),
        "## Results", "Best = lowest validation loss pooled over sites, the earliest on ties.",
        markdown(SUMMARY, summary_rows(results)),
        "### Each site on its own test part (best model)", table,
        class_table(test, "best model, test parts of all sites"),
        ("Intervals assume independent images. Each site's predictions stay in its own folder; "
         "what crossed between sites, and what that does not protect, stands in SECURITY.md. "
         "Research and teaching only, not a medical device."),
        figures_and_settings(folder, run)])
