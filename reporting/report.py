"""The end of a run: logits of the test part become results.json, figures and report.md.

Of one network, of several in folders of their own (folds, hospitals alone), or of hospitals with
images of their own. results.json comes first; nothing that only decorates may end a run.
"""

from checks import warn

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dataset.images import UNITS, Images
from dataset.parts import both_sides
from dataset.splits import Split, count_twins
from reporting import figures, finished, metrics, pages
from reporting.baselines import colour_features, colour_only
from reporting.pages import markdown
from reporting.run_folder import read_json, read_run, unit_of, write_json, write_split
from reporting.terminal import print_table, show

NETWORK = ("data", "synthetic", "fingerprint", "model")  # what all parts of a run have in common


@contextmanager
def decoration(file: str = "results.json") -> Iterator[None]:
    """Around all that only decorates a result: where it fails, one line says so and work goes on.
    file: where the figures stand, written before."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a figure or a table can raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn(f"WARNING: the report is not complete ({reason}); every figure stands in {file}")


def print_summary(folder: Path, results: dict) -> None:
    """The table at the end of a run."""
    print_table(*pages.summary(results))
    pages.print_colour(results)
    print_place(folder)


def print_place(folder: Path) -> None:
    """Where the report stands, if it could be written."""
    if (folder / "report.md").exists():
        print(f"report: {folder}/report.md")


def budget(records: list[dict]) -> dict:
    """What training cost, over rounds, epochs or whole runs."""
    names = ("images", "images_seen"), ("steps", "optimizer_steps"), ("seconds", "seconds")
    return {name: sum(r.get(key, r.get(name)) for r in records) for key, name in names}


def unit_sections(images: Images, several: list[Split], test: dict) -> list[str]:
    """The heading of the results. Where patients, or groups, are known: who stands on both sides of
    the split, how many are in each part, and the intervals that count them."""
    out = [f"**WARNING: {line}.**" for line in both_sides(images, several)] + ["## Results"]
    for unit in UNITS:
        if (by := test.get(f"by_{unit}")) is None:
            continue
        members = images.units()[unit]
        counts = [f"{len(np.unique(members[np.concatenate([s[part] for s in several])]))} in {part}"
                  for part in (several[0] if len(several) == 1 else ["test"])]
        rows = [["accuracy", show(by["accuracy"])]]
        if by["malignant"]:
            rows += [[key, show(value)] for key, value in by["malignant"].items()]
        rows += [[key.replace("_", " "), show({"value": test[key], **by[key]})]
                 for key in ("macro_f1", "kappa", "roc_auc")]
        out += [f"### By {unit}: intervals that count {unit}s",
                f"{unit.capitalize()}s: {', '.join(counts)}. Best model, test part.",
                markdown(["figure", f"value (95 %, {unit}s)"], rows)]
        out += [by["reason"].capitalize() + "."] if by["reason"] else []
    return out


# ---- one network --------------------------------------------------------------------------------

def measure(images: Images, indices: np.ndarray, logits: np.ndarray,
            shares: list[np.ndarray] | None) -> dict:
    """Figures of a whole part, and of each client on its share where there are shares (FedBN).
    logits: float32 [n, C] in the order of `indices`, which are sorted, as each share is."""
    labels, classes = images.labels.numpy()[indices], images.classes
    units = {unit: numbers[indices] for unit, numbers in images.units().items()}
    m = metrics.measure(logits, labels, classes, units)
    if shares:
        rows = [np.searchsorted(indices, share) for share in shares]
        m["clients"] = [metrics.measure(logits[r], labels[r], classes) if len(r) else None
                        for r in rows]
    return m


def write_run(folder: Path, results: dict, history: list[dict], images: Images, split: Split,
              shares: dict[str, list[np.ndarray]], logits: dict, clients: list | None) -> dict:
    """Predictions, results, figures and report.md of one network; returns what results.json holds.
    logits: "last" and "best" → part → float32 [n, C]. shares: part → one for each client, or {}.
    Adds to `results` every figure of both, what training cost, and what colour alone reaches."""
    finished.write_predictions(folder, images, split, logits["best"])
    results = results | budget(history)
    for which, parts in logits.items():
        results[which] |= {"val": None, **{part: measure(images, split[part], x, shares.get(part))
                                           for part, x in parts.items()}}
    results["colour_only"] = colour_only(images, split)
    write_json(folder / "results.json", results)
    with decoration():
        draw_run(folder, results, history, images, split, logits["best"]["test"], clients)
    return results


def draw_run(folder: Path, results: dict, history: list[dict], images: Images, split: Split,
             logits: np.ndarray, clients: list[np.ndarray] | None) -> None:
    """The figures and report.md of `write_run`."""
    best, labels = results["best"], images.labels.numpy()
    test, unit = best["test"], unit_of(best)
    figures.plot_curves([history], folder / "history.png", unit, best[unit])
    figures.plot_confusion(test["confusion"], images.classes, "best model, test",
                           folder / "confusion.png")
    figures.plot_roc(logits, labels[split["test"]], images.classes, test["per_class"],
                     folder / "roc.png")
    if clients is not None:
        figures.plot_clients(images, clients, colour_features(images)["means", "included"],
                             folder / "clients.png")
    chosen = "No validation part: the last epoch is scored."
    if best["val"]:
        when = "for this, too" if np.isin(split["val"], split["test"]).any() else (
            "after training only")
        chosen = ("Best = lowest validation loss, the earliest on ties; the test part was touched "
                  f"{when}.")
    run, twins = read_run(folder), count_twins(images.digests, split["test"], split["train"])
    shares = []  # FedBN only
    if "clients" in test:
        shares = ["### Each client on its own share of the test part (own BatchNorm)",
                  markdown(*pages.clients("client", test["clients"], images.titles(clients)))]
    pages.write_page(folder, [
        pages.head(folder, run, results), *unit_sections(images, [split], test),
        f"{chosen}\n\n{markdown(*pages.summary(results))}",
        pages.class_table(test, "best model, test"), *shares, pages.colour_table(results),
        pages.tail(folder, run, twins, test["n"],
             show(pages.best_colour_row(results, "statistics")["test"]))])


# ---- several networks ---------------------------------------------------------------------------

def pool_folds(folder: Path, images: Images, several: dict[str, list[Split]],
               titles: dict[str, str]) -> None:
    """Results, curves and report of a run that consists of `several` runs, each in its own folder.
    Means over them with sample standard deviation. Of folds, whose test parts are disjoint,
    every image has one prediction made without it: those are pooled, with intervals; AUC is the
    mean over folds, as scores of several networks have no common scale. several: by folder
    the split of that run, or those of its own folds. titles: by folder a client's name."""
    members = {name: read_json(folder / name / "results.json") for name in several}
    first, tests = next(iter(members.values())), {n: m["best"]["test"] for n, m in members.items()}
    results = {key: first[key] for key in NETWORK} | budget(list(members.values()))
    results["members"] = [
        {"name": name, "client": titles.get(name, name), "train": len(several[name][0]["train"]),
         "epoch": m["best"].get("epoch", m["best"].get("round", "–")), "n": tests[name]["n"],
         **{key: tests[name][key] for key in metrics.FIGURES}} for name, m in members.items()]
    results["mean"] = {key: metrics.mean_sd([t[key] for t in tests.values()])
                       for key in metrics.FIGURES}
    if not titles:
        parts = {name: split["test"] for name, (split,) in several.items()}
        write_split(folder, images, parts, [])
        indices = np.sort(np.concatenate(list(parts.values())))
        found = [finished.read_predictions(folder / name) for name in several]
        rows = {path: x for one in found for path, x in zip(one.paths, one.logits, strict=True)}
        logits = np.stack([rows[images.paths[i]] for i in indices])
        test = measure(images, indices, logits, None) | {
            "roc_auc": results["mean"]["roc_auc"]["mean"]}
        for c, row in test["per_class"].items():
            row["auc"] = metrics.mean_sd([t["per_class"][c]["auc"] for t in tests.values()])["mean"]
        for key in test.keys() & {"intervals", *(f"by_{unit}" for unit in UNITS)}:
            test[key]["roc_auc"] = {"low": None, "high": None}
        results["best"] = {"test": test}
        results["colour_only"] = pooled_colour(list(members.values()))
        finished.write_predictions(folder, images, parts, {
            name: logits[np.searchsorted(indices, part)] for name, part in parts.items()})
    write_json(folder / "results.json", results)
    print_table(*pages.members(results))
    if "best" in results:
        pages.print_colour(results)
    with decoration():
        draw_pooled(folder, results, images, several)
    print_place(folder)


def pooled_colour(members: list[dict]) -> list[dict]:
    """The colour-only rows of folds, pooled over their images; folds without a figure are out."""
    def pooled(i: int, part: str) -> dict:
        found = [(m["colour_only"][i][part]["value"], m["best"][part]) for m in members]
        known = [(value, m["n"]) for value, m in found if value is not None]
        return metrics.wilson(sum(round(value * n) for value, n in known), sum(n for _, n in known))
    return [row | {part: pooled(i, part) for part in ("val", "test")}
            for i, row in enumerate(members[0]["colour_only"])]


def draw_pooled(folder: Path, results: dict, images: Images,
                several: dict[str, list[Split]]) -> None:
    """Figures and report.md of `pool_folds`."""
    splits = [s for each in several.values() for s in each]
    histories = [finished.read_history(folder / name) for name, each in several.items()
                 if len(each) == 1]
    if histories:
        figures.plot_curves(histories, folder / "curves.png", unit_of(histories[0][0]))
    run, colour = read_run(folder), "what the report of each part says"
    test = results["best"]["test"] if "best" in results else {}
    sections = [pages.head(folder, run, results), *unit_sections(images, splits, test),
                markdown(*pages.members(results)),
                "Each row is a run in the folder of that name, with a report of its own."]
    if test:
        figures.plot_confusion(test["confusion"], run["classes"], "out of fold",
                               folder / "confusion.png")
        sections += [("The standard deviation over folds is no standard error: training parts "
                      "overlap. The interval is that of the pooled predictions."),
                     pages.class_table(test, "pooled, out of fold"), pages.colour_table(results)]
        colour = show(pages.best_colour_row(results, "statistics")["test"])
    twins = sum(count_twins(images.digests, s["test"], s["train"]) for s in splits)
    n = sum(m["n"] for m in results["members"])
    pages.write_page(folder, [*sections, pages.tail(folder, run, twins, n, colour)])


def write_sites(folder: Path, results: dict, told: dict, history: list[dict],
                classes: list[str]) -> None:
    """Results, figures and report.md of hospitals with images of their own: pooled counts, and a
    row for each hospital. told: "last" and "best" → "val" and "test" → of each hospital what it
    may tell: confusion matrix, number of images and mean loss."""
    for which, parts in told.items():
        for part, several in parts.items():
            counts = [np.array(confusion) for confusion, _, _ in several]
            losses = [np.nan if loss is None else loss * n for _, n, loss in several]
            results[which][part] = metrics.measure_counts(sum(counts), sum(losses), classes) | {
                "clients": [metrics.measure_counts(c, x, classes)
                            for c, x in zip(counts, losses, strict=True)]}
    results |= {"colour_only": [], **budget(history)}
    write_json(folder / "results.json", results)
    summary, test = pages.summary(results), results["best"]["test"]
    sites = pages.clients("site", test["clients"], results["sites"])
    print_table(*summary)
    print_table(*sites)
    with decoration():
        run = read_run(folder)
        figures.plot_curves([history], folder / "history.png", "round", results["best"]["round"])
        figures.plot_confusion(test["confusion"], classes, "best model, test parts of all sites",
                               folder / "confusion.png")
        pages.write_page(folder, [
            f"# {folder.name}",
            (f"Sites: {results['data']}. {results['images_seen']} training passes in "
             f"{results['optimizer_steps']} optimiser steps, commit {run['git']}."),
            "## Results", "Best = lowest validation loss pooled over sites, the earliest on ties.",
            markdown(*summary),
            "### Each site on its own test part (best model)", markdown(*sites),
            pages.class_table(test, "best model, test parts of all sites"),
            ("Intervals assume independent images. Each site's predictions stay in its own folder; "
             "what crossed between sites, and what that does not protect, stands in SECURITY.md. "
             "Research and teaching only, not a medical device."),
            pages.figures_and_settings(folder, run)])
    print_place(folder)
