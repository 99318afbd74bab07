"""What the data give away, and what a trained network really learnt beyond it.

    python audit.py data DIR [--out DIR]     # duplicates, shortcut probes, 200 split seeds
    python audit.py run runs/NAME            # the network against the probes, on its own test part
    python audit.py privacy runs/NAME        # who can tell which images it was trained on

A few minutes for 3,256 images on two cores. Writes report.md, a JSON file, figures, and of data
groups.csv, which --table takes. Pictures in it are for local use only.
"""

from checks import InputError, guard, integer, make_parser, strict

import argparse
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from tqdm import tqdm

import data
import models
from auditing import duplicates, privacy, privacy_page, probes
from dataset import interventions, splits, table
from dataset.images import UNITS
from reporting import figures, finished, inference, metrics, report, run_folder
from reporting.pages import markdown, write_page
from reporting.terminal import show

FOLDS = 5
CAUTION = ("Wilson's intervals take images as independent. That by groups takes groups as "
           "independent, which is too much unless they are patients: images of one patient are "
           "alike even where no two of them overlap.")


# ---- data -------------------------------------------------------------------------------------

def partners(images: data.Images, groups: np.ndarray) -> dict:
    """For each split of data.py: test images with a partner in training, an image of the same group
    (of near-duplicates, joined with the patients and groups that a table knows)."""
    out, labels = {}, images.labels.numpy()
    kinds = {kind: (kind, images.digests) for kind in splits.SPLITS}
    kinds["grouped, these groups"] = ("grouped", groups.tolist())
    kinds |= {"given": ("given", None)} if "split" in images.known else {}
    for name, (kind, units) in kinds.items():
        try:
            split = (splits.given(images.known["split"], labels, 42) if kind == "given" else
                     splits.make_split(kind, labels, 42, paths=images.paths, groups=units))
        except InputError as error:
            out[name] = {"n": None, "partners": None, "identical": None, "why": str(error)}
            continue
        out[name] = {
            "n": len(split["test"]),
            "partners": int(np.isin(groups[split["test"]], groups[split["train"]]).sum()),
            "identical": splits.count_twins(images.digests, split["test"], split["train"])}
    return out


def probe_splits(images: data.Images, groups: np.ndarray) -> dict[str, list[splits.Split]]:
    """The random split of seed 42; 5 grouped and 5 blocked folds where classes are large enough."""
    labels = images.labels.numpy()
    out = {"default": [splits.make_split("random", labels, 42)]}
    for kind in ("grouped", "blocked"):
        with suppress(InputError):
            out[kind] = splits.make_folds(kind, labels, FOLDS, 42, inner_val=0,
                                          paths=images.paths, groups=groups.tolist())
    return out


def seed_distribution(x: np.ndarray, labels: np.ndarray, seeds: int) -> dict:
    """Accuracy of the cheapest probe, nearest neighbour on `x`, over the random splits of many
    seeds, and the place of seed 42 among them."""
    values = np.array([probes.score(x, labels, [splits.make_split("random", labels, s)],
                                    "1-nn")["value"]
                       for s in tqdm(range(seeds), "split seeds", disable=None, leave=False)])
    at_42 = probes.score(x, labels, [splits.make_split("random", labels, 42)], "1-nn")["value"]
    return {"seeds": seeds, "mean": float(values.mean()), "sd": float(values.std(ddof=1)),
            "min": float(values.min()), "max": float(values.max()), "seed_42": at_42,
            "share_below_seed_42": float((values < at_42).mean()),
            "share_equal": float((values == at_42).mean()), "values": values.tolist()}


def probe_table(found: dict) -> str:
    names = list(next(iter(found.values())))
    return markdown(["probe", *names], [
        [probe, *(show(row[name]) for name in names)] for probe, row in found.items()])


def audit_data(args: argparse.Namespace) -> None:
    """Duplicates, shortcut probes and split seeds of a data set."""
    images = data.read_folder(args.data, args.image_size, skip_bad=True, listed=table.chosen(args),
                              skip_unlisted=args.skip_unlisted, cache=args.cache)
    labels = images.labels.numpy()
    with run_folder.made(args.out, f"runs/audit-{images.name}") as folder:
        groups, counts, near = duplicates.find_groups(images)
        groups = splits.joined([groups, *images.units().values()])
        features = probes.features(images)
        several = probe_splits(images, groups)
        rows = {probe: {name: probes.score(x, labels, parts) for name, parts in several.items()}
                for probe, x in tqdm(features.items(), "probes", disable=None, leave=False)}
        result = {
            "data": images.name, "fingerprint": images.fingerprint(), "bad_files": images.bad,
            "duplicates": counts, "joined_with": list(images.units()),
            "test_images_with_partner": partners(images, groups),
            "probes": rows, "majority_class": float(np.bincount(labels).max() / len(labels)),
            "split_seeds": seed_distribution(features["colour statistics"], labels,
                                             args.split_seeds)}
        run_folder.write_csv(folder / "groups.csv", [
            ["path", "label", "group"],
            *([path, images.classes[label], images.paths[g]]
              for path, label, g in zip(images.paths, labels, groups, strict=True))])
        run_folder.write_json(folder / "audit.json", result)
        with report.decoration(f"{folder}/audit.json"):
            figures.plot_pairs(images, near, folder / "near-duplicates.png")
            figures.plot_interventions(images, folder / "interventions.png")
            figures.plot_probes(rows, result["majority_class"], folder / "probes.png")
            figures.plot_seeds(result["split_seeds"], folder / "split-seeds.png")
            write_page(folder, data_page(result))
    print(f"{counts['identical_copies']} identical copies, {counts['near_pairs']} near pairs "
          f"({counts['near_pairs_across_classes']} across classes), {counts['groups']} groups")
    print(probe_table(rows))
    report.print_place(folder)


def data_page(result: dict) -> list[str]:
    """The sections of report.md of a data audit."""
    counts, seeds = result["duplicates"], result["split_seeds"]
    split_rows = [[name, "–", "–", row["why"]] if row["n"] is None else
                  [name, row["n"], row["identical"], row["partners"]]
                  for name, row in result["test_images_with_partner"].items()]
    return [
        f"# What {result['data']} gives away",
        (f"{counts['images']} images, fingerprint `{result['fingerprint'][:16]}`; "
         f"{len(result['bad_files'])} unreadable."),
        "## Duplicates",
        markdown(["what", "number"], [[k.replace("_", " "), v] for k, v in counts.items()]),
        (f"Near: at least {duplicates.OVERLAP:.0%} of the field in common, correlation at least "
         f"{duplicates.CORRELATION:g} there. Pairs across classes are false alarms, or labels that "
         "disagree. Rotated, mirrored and rescaled copies are not looked for."),
        markdown(["split", "test images", "identical twin in training", "partner in training"],
                 split_rows),
        ("Partner: an image of the same group of near-duplicates"
         + "".join(f", or of the same {unit}" for unit in result["joined_with"])
         + ". `groups.csv` holds groups of partners: a table for `--table` of the trainers."),
        "## Shortcut probes", (
            "RBF SVM (C = 10) on a few numbers an image, no network; accuracy with Wilson 95 % "
            "interval; default is the random split with seed 42; folds are pooled, only grouped "
            f"ones keep groups together. Largest class: {result['majority_class']:.4f}."),
        probe_table(result["probes"]),
        (f"Nearest neighbour on colour statistics over the split seeds 0 to {seeds['seeds'] - 1}: "
         f"{seeds['mean']:.4f} ± {seeds['sd']:.4f} ({seeds['min']:.4f} to {seeds['max']:.4f}). "
         f"Seed 42: {seeds['seed_42']:.4f}; {seeds['share_below_seed_42']:.1%} of the seeds lie "
         f"below it, {seeds['share_equal']:.1%} are equal."),
        "## Figures (local use only)",
        *(f"![{name}]({name}.png)" for name in
          ("probes", "split-seeds", "near-duplicates", "interventions"))]


# ---- a trained run ----------------------------------------------------------------------------

def against_probes(correct: np.ndarray, images: data.Images, split: splits.Split,
                   members: np.ndarray | None = None) -> dict:
    """Paired tests of the network (bool, test part) against each probe on the same pixels.
    members: the patient or group of each test image, int [n], if they are known."""
    labels, out = images.labels.numpy(), {}
    for name, x in probes.features(images).items():
        hit = probes.fit_predict(x, labels, split["train"], split["test"]) == labels[split["test"]]
        out[name] = {"accuracy": metrics.wilson(int(hit.sum()), len(hit)),
                     "difference": metrics.paired_difference(correct, hit, members, "group"),
                     "mcnemar": metrics.mcnemar(correct, hit) if members is None else None}
    return out


def under_interventions(trained: inference.Trained, pixels: torch.Tensor, labels: np.ndarray,
                        correct: np.ndarray, members: np.ndarray | None = None) -> dict:
    """Accuracy on the test part with more taken away than in training, beside the plain one."""
    out = {}
    for name in interventions.INTERVENTIONS:
        if name in trained.interventions:
            continue
        p = inference.logits(trained, interventions.apply(pixels, [name])).argmax(1).numpy()
        hit = p == labels
        out[name] = {"accuracy": metrics.wilson(int(hit.sum()), len(hit)),
                     "difference": metrics.paired_difference(hit, correct, members, "group")}
    return out


def read_groups(listed: table.Table | None, run_args: argparse.Namespace | None,
                images: data.Images) -> np.ndarray:
    """int [n]: the patients or groups of a run's images, from a table, which may name others, too:
    where it has paths of the run's own, these alone count. Without a table their duplicate groups,
    joined with what the run itself knew; run_args: the arguments that it was made with."""
    if listed is None:
        found = privacy.picture_groups(run_args, images)
        return splits.joined([found, *images.units().values()])
    root = images.root or Path()  # drawn smears have none
    files, places = [root / path for path in images.paths], [root, *root.parents]
    known = set(files)
    own = {path: row for path, row in listed.rows.items()
           if any(place / path in known for place in places)}
    rows = table.match(replace(listed, rows=own or listed.rows), files, places)
    units = [splits.numbered(np.array([rows.get(i, {}).get(unit, "") for i in range(len(files))]))
             for unit in UNITS if unit in listed.columns]
    if not units:
        raise InputError(f"{listed.name}: has neither a column patient nor a column group")
    if len(rows) < len(files):
        raise listed.wrong("image(s) of the run are not in it",
                           [path for i, path in enumerate(images.paths) if i not in rows])
    return splits.joined(units)


def audit_run(args: argparse.Namespace) -> None:
    """A trained network against the probes, on its own test part."""
    folder = Path(args.run)
    if run_folder.read_run(folder)["arguments"].get("bn") == "local":
        raise InputError(f"{folder}: every client has its own BatchNorm; one network is audited")
    trained = inference.load(folder, models.pick_device(args.device))
    run, images = finished.load_images(folder, args.data, args.cache)
    test = finished.read_predictions(folder)
    groups = read_groups(table.chosen(args), finished.read_arguments(folder, args.data, args.cache),
                         images)
    split = run_folder.read_split(folder, images)[0]
    place = {path: i for i, path in enumerate(test.paths)}
    rows = [place[images.paths[i]] for i in split["test"]]
    logits, labels = test.logits[rows], test.labels[rows]
    correct = logits.argmax(1) == labels
    members = groups[split["test"]] if args.table or images.units() else None
    alone = ~np.isin(groups[split["test"]], groups[split["train"]])
    result = {
        "run": folder.name, "data": images.name, "synthetic": run["synthetic"],
        "interventions": list(trained.interventions), "n": len(labels),
        "accuracy": metrics.wilson(int(correct.sum()), len(labels)),
        "clustered": metrics.clustered(correct, groups[split["test"]]),
        "groups": "groups of the table" if args.table else " and ".join(
            ["duplicate groups", *(f"{unit}s, joined" for unit in images.units())]),
        "groups_in_test": len(np.unique(groups[split["test"]])),
        "without_partner": metrics.wilson(int(correct[alone].sum()), int(alone.sum())),
        "with_partner": metrics.wilson(int(correct[~alone].sum()), int((~alone).sum())),
        "probes": against_probes(correct, images, split, members),
        "under_interventions": under_interventions(trained, images.pixels[split["test"]], labels,
                                                   correct, members),
        "ece": metrics.calibration_error(softmax(logits, axis=1), labels)}
    result["called_benign"] = None  # where nothing is known to be malignant or benign
    if metrics.is_binary(images.classes):
        benign = images.classes.index("Benign")
        missed = np.flatnonzero((logits.argmax(1) == benign) & (labels != benign))
        result["called_benign"] = [images.paths[split["test"][i]] for i in missed]
    with run_folder.made(args.out, str(folder / "audit")) as out:
        run_folder.write_json(out / "audit.json", result)
        with report.decoration(f"{out}/audit.json"):
            figures.plot_reliability(softmax(logits, axis=1), labels, out / "reliability.png")
            write_page(out, run_page(result))
    report.print_place(out)


def run_page(result: dict) -> list[str]:
    """The sections of report.md of the audit of a run."""
    best = max(result["probes"].items(), key=lambda item: item[1]["accuracy"]["value"])
    more = (best[1]["difference"]["low"] or 0) > 0
    loud = "**SYNTHETIC DATA**\n\n" if result["synthetic"] else ""
    rows = [[name, show(p["accuracy"]), show(p["difference"]),
             *([f"{m['a_only']} / {m['b_only']}", f"{m['p']:.2g}"] if (m := p["mcnemar"])
               else ["–", "–"])]
            for name, p in result["probes"].items()]
    missed = []
    if (paths := result["called_benign"]) is not None:
        missed = ["## Malignant images called benign",
                  "\n".join(f"- {path}" for path in paths) or "none"]
    return [
        f"# What {result['run']} learnt",
        (f"{loud}Best model, {result['n']} test images. Interventions in training: "
         f"{', '.join(result['interventions']) or 'none'}."),
        "## More than the probes?",
        (f"The best of {len(rows)} probes on these images is *{best[0]}*. The network knows "
         f"**{'more' if more else 'nothing more that this test part shows'}**: difference "
         f"{show(best[1]['difference'])}."),
        markdown(["probe, same images and training part", "accuracy", "network − probe",
                  "right alone: network / probe", "McNemar p"], rows),
        "## Independence",
        markdown(["accuracy", "value"], [
            ["all test images, Wilson", show(result["accuracy"])],
            [f"all, by {result['groups_in_test']} {result['groups']}", show(result["clustered"])],
            ["without a partner in training", show(result["without_partner"])],
            ["with a partner in training", show(result["with_partner"])]]), CAUTION,
        "## Under interventions", markdown(
            ["intervention on the test images alone", "accuracy", "difference"],
            [[name, show(p["accuracy"]), show(p["difference"])]
             for name, p in result["under_interventions"].items()]),
        *missed,
        "## Calibration", f"Expected calibration error {show(result['ece'])}.",
        "![reliability](reliability.png)"]


# ---- who was in training ------------------------------------------------------------------------

def audit_privacy(args: argparse.Namespace) -> None:
    """What the final model, the other hospitals and the server tell of who was in training."""
    folder, listed = Path(args.run), table.chosen(args)
    case = privacy.prepare(folder, args.alone, args.replay > 0, args.data, args.device, args.cache)
    groups = None if case.run is None else read_groups(listed, case.args, case.run.images)
    with run_folder.made(None, str(folder / "privacy")) as out:  # before minutes of work
        result = privacy.measure(case, groups)
        run_folder.write_json(out / "privacy.json", result)
        with report.decoration(f"{out}/privacy.json"):
            write_page(out, privacy_page.page(result))
            if result["parts"]:
                privacy_page.plot_membership(result, out / "membership.png")
                privacy_page.plot_server(result, out / "server.png")
    print(privacy_page.proof(result))
    report.print_place(out)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="data|run|privacy")
    of_data, of_run, of_privacy = (
        strict(kinds.add_parser(kind, help=words)).add_argument for kind, words in (
            ("data", "audit a data set"), ("run", "audit a trained run"),
            ("privacy", "who can tell which images a run was trained on")))
    of_data("data", metavar="DIR")
    of_data("--out", metavar="DIR", help="default runs/audit-NAME")
    of_data("--image-size", type=integer(32), default=224, help="side in pixels (default 224)")
    of_data("--split-seeds", type=integer(2), default=200, help="of the seed distribution")
    of_run("--out", metavar="DIR", help="default RUN/audit, numbered if taken")
    of_privacy("--alone", metavar="RUN", help="its hospitals alone: train_central.py --like RUN "
               "--local-only")
    of_privacy("--replay", type=int, choices=(0, 1), default=1,
               help="replay two rounds, for what the server sees (default 1; 0 = do not)")
    for add in (of_run, of_privacy):
        add("run", metavar="RUN", help="run folder")
        add("--data", metavar="DIR", help="where the images of the run are now, if they were moved")
        add("--device", default="auto")
    for add in (of_data, of_run, of_privacy):
        table.add_arguments(add)
        add("--cache", metavar="DIR", help="keep decoded pixels in files there, for the next start")
    args = parser.parse_args(argv)
    if getattr(args, "out", None) and Path(args.out).exists():  # said before minutes of work
        raise InputError(f"--out {args.out}: exists already")
    {"data": audit_data, "run": audit_run, "privacy": audit_privacy}[args.kind](args)


if __name__ == "__main__":
    guard(main)
