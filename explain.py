"""Why a trained run answers as it does, and whether to believe the picture.

    python explain.py runs/NAME                     # test images by a fixed rule, and every error
    python explain.py runs/NAME --images a.png      # others
    python explain.py runs/NAME --per-class 1 --samples 100      # a minute on two cores

Input gradient, integrated gradients, Grad-CAM and LIME; each checked by deletion, by randomising
the weights, by its share of the scale-bar corner and of the background. All in float32.
"""

from checks import InputError, guard, integer, make_parser, number, warn

import argparse
import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import models
from dataset import interventions
from dataset.files import decode_all
from explaining import attribution, faithfulness
from reporting import figures, finished, inference, pages, report, run_folder, terminal

METHODS = ("gradient", "integrated-gradients", "grad-cam", "lime")
STAGES = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the layers randomised; 0 = the head alone
TOLERANCE = 1e-3  # of probabilities, beyond which the explained network is not the evaluated one


@dataclass(frozen=True, eq=False)
class Subject:
    """One image to explain."""
    path: str
    pixels: Tensor  # uint8 [3, H, W]
    truth: int | None
    p: np.ndarray  # [C]
    chosen: str  # by the rule, misclassified, given

    def targets(self) -> list[int]:
        """The class predicted, and the true one where it differs."""
        predicted = int(self.p.argmax())
        return [predicted] + [self.truth] * (self.truth not in (None, predicted))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    add = parser.add_argument_group("images").add_argument
    add("--images", nargs="+", metavar="FILE", help="explain these instead of test images")
    add("--data", metavar="DIR", help="where the images of the run are now, if they were moved")
    add("--cache", metavar="DIR", help="keep decoded pixels in files there, for the next start")
    add("--per-class", type=integer(1), default=3,
        help="test images of each class, evenly spaced in path order (default 3)")
    add = parser.add_argument_group("methods").add_argument
    add("--layer", metavar="MODULE", help="of Grad-CAM (default: the last convolution)")
    add("--steps", type=integer(1), default=32, help="of integrated gradients (default 32)")
    add("--samples", type=integer(10), default=1000, help="of LIME (default 1000)")
    add("--lime-seeds", type=integer(2), default=3, help="LIME repeats for stability (default 3)")
    add("--rectangle", type=number(0, 1), nargs=4, default=interventions.CORNER,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="in shares of the side; default: the "
        "lower right corner, where the scale bar is burnt in")


# ---- which images -------------------------------------------------------------------------------

def choose(test: finished.Predictions, predicted: np.ndarray, per_class: int) -> dict[int, str]:
    """Row → reason: of each class `per_class` test images, evenly spaced by path; all errors.
    predicted: int [n], the class that the network says of each test image."""
    chosen = {}
    for c in range(len(test.classes)):
        members = np.flatnonzero(test.labels == c)
        count = min(per_class, len(members))
        for j in range(count):
            chosen[int(members[(2 * j + 1) * len(members) // (2 * count)])] = "rule"
    for i in np.flatnonzero(predicted != test.labels).tolist():
        chosen.setdefault(i, "misclassified")
    return chosen


def of_the_run(folder: Path, trained: inference.Trained, per_class: int,
               place: str | None = None, cache: str | None = None) -> list[Subject]:
    """Test images of the run. Refuses data that changed; warns where predictions.csv differs, save
    of a client's own network, which did not predict all of them."""
    test = finished.read_predictions(folder)
    images = finished.load_images(folder, place, cache)[1]
    place = {path: i for i, path in enumerate(images.paths)}
    pixels = images.pixels[[place[path] for path in test.paths]]
    p = inference.probabilities(trained, pixels)
    off = np.abs(p - np.exp(test.logits)).max()
    if off > TOLERANCE and trained.client is None:
        warn(f"WARNING: probabilities differ by {off:.2g} from {folder}/predictions.csv: not the "
             "network that was evaluated")
    return [Subject(test.paths[i], pixels[i], int(test.labels[i]), p[i], why)
            for i, why in choose(test, p.argmax(1), per_class).items()]


def given(files: list[str], trained: inference.Trained) -> list[Subject]:
    subjects = []
    for name in files:
        (decoded,) = decode_all([Path(name)], trained.image_size)
        if isinstance(decoded, str):
            raise InputError(f"--images {name}: {decoded}")
        pixels = torch.from_numpy(decoded[0].copy()).permute(2, 0, 1)
        pixels = interventions.apply(pixels[None], trained.interventions)[0]
        p = inference.probabilities(trained, pixels[None])[0]
        subjects.append(Subject(name, pixels, None, p, "given"))
    return subjects


# ---- maps and checks ----------------------------------------------------------------------------

def gradient_maps(model: torch.nn.Module, subject: Subject, target: int,
                  args: argparse.Namespace) -> dict:
    """The three methods that follow gradients, by name."""
    device = next(model.parameters()).device
    x = data.normalise(subject.pixels[None].to(device).float().div_(255))
    return {"gradient": attribution.saliency(model, x, target),
            "integrated-gradients": attribution.integrated_gradients(model, x, target, args.steps),
            "grad-cam": attribution.grad_cam(model, x, target,
                                             attribution.find_layer(model, args.layer))}


def explain(trained: inference.Trained, subject: Subject, args: argparse.Namespace,
            classify: attribution.Classify) -> dict:
    """The maps by (method, class), [H, W]; the superpixels; LIME's weights by seed and class."""
    lime = [attribution.lime(classify, subject.pixels, subject.targets(), args.samples, seed)
            for seed in range(args.lime_seeds)]
    segments = lime[0][0]
    maps = {}
    for target in subject.targets():
        for name, values in gradient_maps(trained.model, subject, target, args).items():
            maps[name, target] = values
        maps["lime", target] = lime[0][1][target][segments].astype(np.float32)
    return {"maps": maps, "segments": segments, "lime": [weights for _, weights in lime]}


def check(subject: Subject, found: dict, args: argparse.Namespace,
          classify: attribution.Classify, seed: int) -> dict[str, dict]:
    """For each method, on the predicted class: deletion and random area, shares of the regions. A
    flat map puts the cells in no order: it has no deletion area."""
    target = subject.targets()[0]
    corner = faithfulness.rectangle(subject.pixels.shape[1:], args.rectangle)
    bright = interventions.background(subject.pixels)
    chance = faithfulness.random_area(classify, subject.pixels, target, seed)
    out = {}
    for method in METHODS:
        values = found["maps"][method, target]
        order = np.argsort(-faithfulness.cell_means(values), kind="stable")
        out[method] = {
            "deletion_area": None if faithfulness.is_flat(values) else faithfulness.deletion_area(
                classify, subject.pixels, target, order),
            "random_area": chance, "corner": faithfulness.share_inside(values, corner),
            "background": faithfulness.share_inside(values, bright)}
    out["lime"]["jaccard"] = faithfulness.jaccard([weights[target] for weights in found["lime"]])
    return out


def randomise(trained: inference.Trained, subjects: list[Subject], founds: list[dict],
              args: argparse.Namespace, bar: tqdm) -> dict[str, list[list[float | None]]]:
    """Per method and stage the rank correlation of each subject's map with the original; LIME at
    the last stage alone."""
    fresh = models.build(trained.name, len(trained.classes), seed=1).state_dict()
    model = copy.deepcopy(trained.model)
    classify = partial(inference.probabilities, replace(trained, model=model))
    out = {method: [[] for _ in STAGES] for method in METHODS}
    for stage, share in enumerate(STAGES):
        model.load_state_dict(faithfulness.randomised(trained.model, fresh, share))
        for subject, found in zip(subjects, founds, strict=True):
            target = subject.targets()[0]
            maps = gradient_maps(model, subject, target, args)
            if share == 1:
                segments, weights = attribution.lime(classify, subject.pixels,
                                                     [target], args.samples, 0)
                maps["lime"] = weights[target][segments]
            for method, values in maps.items():
                out[method][stage].append(faithfulness.rank_correlation(
                    values, found["maps"][method, target]))
        bar.update()
    return out


# ---- verdicts -----------------------------------------------------------------------------------

def verdicts(checks: list[dict], correlations: dict, subjects: list[Subject],
             args: argparse.Namespace) -> dict:
    """Per method every figure with n and 95 % interval, and what follows from it."""
    shape = tuple(subjects[0].pixels.shape[1:])
    areas = {"corner": float(faithfulness.rectangle(shape, args.rectangle).mean()),
             "background": float(np.mean([interventions.background(s.pixels).mean()
                                          for s in subjects]))}
    out = {"images": len(checks), "area": areas, "rectangle": list(args.rectangle),
           "stages": list(STAGES), "methods": {}}
    for method in METHODS:
        rows = [c[method] for c in checks]
        gain = faithfulness.mean_interval([
            None if r["deletion_area"] is None else r["random_area"] - r["deletion_area"]
            for r in rows])
        rho = [faithfulness.mean_interval(values) for values in correlations[method]]
        m = {"deletion_gain": gain, "faithful": gain["low"] is not None and gain["low"] > 0,
             "rank_correlation": rho,
             "sensitive": rho[-1]["high"] is not None and rho[-1]["high"] < 0.5,
             **{key: faithfulness.mean_interval([r[key] for r in rows]) for key in areas}}
        if method == "lime":
            m["jaccard"] = faithfulness.mean_interval([r["jaccard"] for r in rows])
        out["methods"][method] = m
    return out


def verdict_table(found: dict) -> str:
    """The verdicts as Markdown."""
    rows = []
    for method, m in found["methods"].items():
        rows.append([
            method, "faithful" if m["faithful"] else "**not shown faithful**",
            "sensitive to the weights" if m["sensitive"] else "**not shown sensitive**",
            *(terminal.show(m[key]) for key in ("deletion_gain", "corner", "background")),
            terminal.show(m["rank_correlation"][-1]), terminal.show(m.get("jaccard"))])
    rows.append(["(share of area)", "", "", "", terminal.show(found["area"]["corner"]),
                 terminal.show(found["area"]["background"]), "", ""])
    return (f"n = {found['images']} images, predicted class; mean and 95 % interval over them.\n\n"
            + pages.markdown(["method", "deletion", "weights", "random − deletion area",
                               "share in the corner", "share on the brightest quarter",
                               "ρ after full randomisation", "Jaccard over seeds"], rows)
            + "\n\nFaithful: the interval of random − deletion area lies above 0 (the same cells, "
            "painted over in the order of the map or at random). Sensitive: the upper bound of the "
            "rank correlation with the map of the untrained network is below 0.5 (images "
            "for which one of the two maps is flat do not count).")


def write_table(out: Path, subjects: list[Subject], founds: list[dict], checks: list[dict | None],
                classes: list[str]) -> None:
    """maps/*.npy and explanations.csv: a row per image, method and class."""
    (out / "maps").mkdir()
    keys = ("deletion_area", "random_area", "corner", "background", "jaccard")
    rows = [["path", "truth", "prediction", "probability", "chosen", "method", "class", "map",
             "scale", *keys]]
    for i, (s, found, checked) in enumerate(zip(subjects, founds, checks, strict=True)):
        for (method, target), values in found["maps"].items():
            name = f"maps/{i:03d}-{method}-{target}.npy"
            np.save(out / name, values.astype(np.float32))
            own = checked[method] if checked and target == s.targets()[0] else {}
            rows.append([s.path, "" if s.truth is None else classes[s.truth],
                         classes[s.p.argmax()], f"{s.p.max():.6f}", s.chosen, method,
                         classes[target], name, f"{figures.scale(values):.6g}",
                         *("" if own.get(k) is None else f"{own[k]:.6f}" for k in keys)])
    run_folder.write_csv(out / "explanations.csv", rows)


def write_report(folder: Path, out: Path, found: dict, subjects: list[Subject],
                 of_the_test: bool) -> None:
    """report.md in `out`; of test images, the verdicts in the run's own report.md too."""
    table = verdict_table(found)
    if found.get("client") is not None:
        table = f"The network of client {found['client']}. {table}"
    listed = "\n".join(f"- {s.path} ({s.chosen})" for s in subjects)
    drawn = "\n\n".join(f"![{p.stem}]({p.name})" for p in sorted(out.glob("*.png")))
    pages.write_page(out, [f"# Explanations of {folder.name}", table, "## Images", listed,
                            "## Figures", drawn])
    page = folder / "report.md"
    if page.exists() and of_the_test:
        before = page.read_text("utf-8", "surrogateescape").partition("\n\n## Explanations")[0]
        run_folder.write_text(page, f"{before}\n\n## Explanations\n\n{table}\n\n"
                        f"Pictures and raw maps: {out.name}/report.md\n")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    inference.add_arguments(parser)
    args = parser.parse_args(argv)
    folder = Path(args.run)
    if not (args.rectangle[0] < args.rectangle[2] and args.rectangle[1] < args.rectangle[3]):
        raise InputError("--rectangle: left < right and top < bottom")
    trained = inference.load(folder, models.pick_device(args.device), args.client)
    attribution.find_layer(trained.model, args.layer)
    if trained.image_size < faithfulness.GRID:
        raise InputError(f"images of {trained.image_size} pixels are too small to explain")
    subjects = given(args.images, trained) if args.images else \
        of_the_run(folder, trained, args.per_class, args.data, args.cache)
    founds, checks = [], []
    classify = partial(inference.probabilities, trained)
    with run_folder.made(None, str(folder / "explanations")) as out:  # before all the work
        with tqdm(total=len(subjects) + len(STAGES), desc="explaining", disable=None) as bar:
            for i, s in enumerate(subjects):
                founds.append(explain(trained, s, args, classify))
                checks.append(None if s.chosen == "misclassified" else
                              check(s, founds[-1], args, classify, seed=i))
                bar.update()
            checked = [i for i, c in enumerate(checks) if c]
            correlations = randomise(trained, [subjects[i] for i in checked],
                                     [founds[i] for i in checked], args, bar)
        found = verdicts([checks[i] for i in checked], correlations,
                         [subjects[i] for i in checked], args) | {"client": trained.client}
        write_table(out, subjects, founds, checks, trained.classes)
        run_folder.write_json(out / "explanations.json", found)
        with report.decoration(f"{out}/explanations.json"):
            figures.write(out, subjects, founds, trained.classes, METHODS)
            write_report(folder, out, found, subjects, of_the_test=not args.images)
    print(verdict_table(found) + "\n")
    report.print_place(out)


if __name__ == "__main__":
    guard(main)
