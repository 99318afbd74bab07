"""A run that consists of several runs: the folds of a cross-validation, or hospitals alone."""

from pathlib import Path

import numpy as np

import data
from dataset import splits
from reporting import metrics, report, run_folder, tables
from training import evaluation


def pool_folds(folder: Path, images: data.Images, several: dict[str, splits.Split],
               titles: dict[str, str]) -> dict:
    """Results, curves and report of a run that consists of `several` runs, each in its own folder.
    Means over them with sample standard deviation. Where their test parts are disjoint (folds),
    every image has one prediction made without it: those are pooled, with intervals. titles: the
    clients that folders stand for, by folder."""
    members = {name: run_folder.read_json(folder / name / "results.json") for name in several}
    first, tests = next(iter(members.values())), {n: m["best"]["test"] for n, m in members.items()}
    results = {key: first[key] for key in ("data", "synthetic", "fingerprint", "model")}
    results |= evaluation.budget(list(members.values()))
    results["members"] = [
        {"name": name, "client": titles.get(name, name), "train": len(several[name]["train"]),
         "epoch": m["best"]["epoch"], "n": tests[name]["n"],
         **{key: tests[name][key] for key in metrics.FIGURES}} for name, m in members.items()]
    results["mean"] = {key: metrics.mean_sd([t[key] for t in tests.values()])
                       for key in metrics.FIGURES}
    drawn = None
    indices = np.concatenate([split["test"] for split in several.values()])
    if len(set(indices.tolist())) == len(indices):
        parts = [tables.read_predictions(folder / name) for name in several]
        rows = {path: x for part in parts for path, x in zip(part.paths, part.logits, strict=True)}
        indices = np.sort(indices)
        logits = np.stack([rows[images.paths[i]] for i in indices])
        labels = images.labels.numpy()
        results["best"] = {"test": metrics.measure(logits, labels[indices], images.classes,
                                                   images.units(indices))}
        results["colour_only"] = pooled_colour(list(members.values()))
        tables.write_predictions(folder, images,
                                     {name: s["test"] for name, s in several.items()},
                                     {name: logits[np.searchsorted(indices, s["test"])]
                                      for name, s in several.items()})
        drawn = logits, labels[indices]
    histories = [run_folder.read_history(folder / name) for name in several]
    report.write_pooled(folder, results, images, list(several.values()), histories, drawn)
    return results


def pooled_colour(members: list[dict]) -> list[dict]:
    """The colour-only rows of folds, pooled over their test images."""
    rows = []
    for i, row in enumerate(members[0]["colour_only"]):
        sizes = [m["best"]["test"]["n"] for m in members]
        hits = sum(round(m["colour_only"][i]["test"]["value"] * n)
                   for m, n in zip(members, sizes, strict=True))
        rows.append({**row, "val": metrics.wilson(0, 0), "test": metrics.wilson(hits, sum(sizes))})
    return rows
