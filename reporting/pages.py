"""The pieces of a report, in Markdown and on the terminal: numbers, tables, sections."""

import shlex
from pathlib import Path

from dataset.files import CLASSES
from reporting.run_folder import unit_of, write_text
from reporting.terminal import show


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(x).replace("|", "\\|").split())
                                       for x in line) + " |" for line in lines)


def summary(results: dict) -> tuple[list[str], list[list]]:
    """Header and rows model × part: n, loss, accuracy with interval, macro F1, κ, AUC."""
    rows, unit = [], unit_of(results["best"])
    for which in ("best", "last"):
        for part in ("val", "test"):
            if (m := results[which][part]) is None:  # trained without a validation part
                continue
            rows.append([f"{which} ({unit} {results[which][unit]})", part, m["n"], show(m["loss"]),
                         show(m["accuracy"]), show(m["macro_f1"]), show(m["kappa"]),
                         show(m["roc_auc"])])
    return ["model", "part", "n", "loss", "accuracy (95 %)", "macro F1", "kappa", "AUC"], rows


def best_colour_row(results: dict, kind: str) -> dict:
    """The classifier on colour `kind` (means, statistics) that is best on validation; the first SVM
    where nothing validates."""
    rows = [row for row in results["colour_only"] if row["features"] == kind]
    return max(rows, key=lambda row: (row["val"]["value"] or 0, row["classifier"][:3] == "rbf"))


def print_colour(results: dict) -> None:
    for kind in ("means", "statistics"):
        top = best_colour_row(results, kind)
        print(f"colour {kind} alone ({top['classifier']}, strip {top['strip']}): validation "
              f"{show(top['val'])}, test {show(top['test'])}")


def members(results: dict) -> tuple[list[str], list[list]]:
    """Header and rows: each fold or site, their mean ± sd, the pooled predictions if there are."""
    keys = ("accuracy", "macro_f1", "kappa", "roc_auc")
    rows = [[m.get("client", m["name"]), m["train"], m["epoch"], m["n"],
             *(show(m[key]) for key in keys)] for m in results["members"]]
    rows.append([f"mean ± sd of {len(rows)}", "", "", "",
                 *(show(results["mean"][key]) for key in keys)])
    if "best" in results:
        m = results["best"]["test"]
        rows.append(["pooled, out of fold", "", "", m["n"], *(show(m[key]) for key in keys)])
    return ["part", "training images", "best", "n", "accuracy (95 %)", "macro F1", "kappa",
            "AUC"], rows


def clients(kind: str, found: list[dict | None], names: list) -> tuple[list[str], list[list]]:
    """Header and a row for each client or hospital (`kind`): its name, n, accuracy, macro F1."""
    return [kind, "n", "accuracy (95 %)", "macro F1"], [
        [name, 0, "–", "–"] if m is None else
        [name, m["n"], show(m["accuracy"]), show(m["macro_f1"])]
        for name, m in zip(names, found, strict=False)]


MODEL_CARD = """## Model card

- **Intended use**: research and teaching. Not a medical device; not for diagnosis.
- **Data**: {data}. Fingerprint `{fingerprint}`.
- **Split**: `{split}`, split seed {split_seed}. {level}
- **Known leaks**: {twins} of {n} test images have an identical twin in the training part; {leaks}
- **Intervals** assume independent images. {intervals}
- **Privacy**: no secure aggregation, no differential privacy: nothing is claimed.
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
TABLE = OWN | {"level": "Where the table names patients or groups, the results say on which sides "
                        "they stand. " + OWN["level"],
               "intervals": "Those by patient and by group do not."}
SYNTHETIC = {"level": "Each picture is drawn independently.",
             "leaks": "none else by construction.", "intervals": "Here that holds."}


def head(folder: Path, run: dict, results: dict) -> str:
    """Title, command and cost."""
    loud = "**SYNTHETIC DATA: drawn, not medical. Figures show that the code works, no more.**\n\n"
    return (
        f"# {folder.name}\n\n{loud if run['synthetic'] else ''}"
        f"`python {run['script']} {shlex.join(run['argv'])}`\n\n"
        f"{run['images']} images of {run['data']}; {results['images_seen']} training passes in "
        f"{results['optimizer_steps']} optimiser steps, {results['seconds']:.0f} s on "
        f"{run['machine']['device']} ({run['machine']['name']}, {run['machine']['threads']} "
        f"threads), torch {run['machine']['torch']}, commit {run['git']}."
        + (f" Passed over: {run['ignored_files']}." if run["ignored_files"] else "")
        + (f" Unreadable and left out: {len(run['bad_files'])}." if run["bad_files"] else ""))


def class_table(test: dict, title: str) -> str:
    """Per class, and malignant against benign."""
    rows = [[name, *(show(m[k]) for k in ("precision", "recall", "specificity", "f1", "auc")),
             m["support"]] for name, m in test["per_class"].items()]
    text = f"### Per class ({title})\n\n" + markdown(
        ["class", "precision", "recall", "specificity", "F1", "AUC", "support"], rows)
    if (both := test["malignant"]) is not None:
        text += (f"\n\nMalignant against benign: sensitivity {show(both['sensitivity'])}, "
                 f"specificity {show(both['specificity'])}.")
    return f"{text}\n\nECE {show(test['ece'])}, Brier {show(test['brier'])}."


def colour_table(results: dict) -> str:
    rows = [[f"{row['features']}, {row['classifier']}, strip {row['strip']}", show(row["val"]),
             show(row["test"])] for row in results["colour_only"]]
    return ("### What colour alone reaches\n\nNo network: classifiers on whole-image colour, "
            f"fitted on {results['colour_only'][0]['fitted_on']} training images.\n\n"
            + markdown(["statistics", "validation", "test"], rows))


def figures_and_settings(folder: Path, run: dict) -> str:
    """Every figure of the folder, and every argument that is set."""
    drawn = "\n\n".join(f"![{p.stem}]({p.name})" for p in sorted(folder.glob("*.png")))
    settings = [[k, v] for k, v in run["arguments"].items()
                if v is not None and v is not False]  # a zero is a setting
    return f"## Figures\n\n{drawn}\n\n## Settings\n\n{markdown(['argument', 'value'], settings)}"


def tail(folder: Path, run: dict, twins: int, n: int, colour: str) -> str:
    """Figures, settings and model card."""
    public = run["classes"] == list(CLASSES) and run["images"] in (3256, 3242)  # either ALL set
    card = MODEL_CARD.format(
        data=f"{run['data']}, {run['images']} images, classes {', '.join(run['classes'])}",
        fingerprint=run["fingerprint"][:16], split=run["arguments"]["split"], twins=twins,
        split_seed=run["arguments"]["split_seed"], n=n, colour=colour,
        **(SYNTHETIC if run["synthetic"] else TABLE if run["arguments"]["table"] else
           ALL_SET if public else OWN))
    return f"{figures_and_settings(folder, run)}\n\n{card}"


def write_page(folder: Path, sections: list[str]) -> None:
    """report.md of these sections; empty ones are left out."""
    write_text(folder / "report.md", "\n\n".join(s for s in sections if s).rstrip() + "\n")
