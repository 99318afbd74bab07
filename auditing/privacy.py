"""Who can tell which images a run was trained on: four attacks, each beside its null.

    A1  whoever holds the final model  φ of the model (Yeom et al. 2018)
    A2  the other hospitals together   φ less the mean φ of the models that they trained alone
    A3  the server                     φ of hospital k's update less the mean φ of the others'
    A4  the server                     whose image: the update with the highest φ (Hu et al. 2021)

φ(x) = z_y - log Σ_{j≠y} exp z_j is the log-odds of the true class y (the scaling of LiRA, Carlini
et al. 2022), from logits z of the unaugmented image. A2 and A3 are calibrated by what an image's
difficulty is elsewhere (Watson et al. 2022). Members are training images, non-members test images:
validation images chose the round. On both sides only images stand without another image of their
group in training. No attack is chosen after the fact, and no ε follows from any of them.
"""

from checks import InputError

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import fedavg
import models
from auditing import duplicates, membership
from auditing.membership import Sides
from reporting import finished, provenance, run_folder
from training import evaluation, experiment
from training.processes import Job

ATTACKS = ("A1", "A2", "A3", "A4")
EXCHANGEABLE = ("iid", "dirichlet", "dirichlet-equal", "shards")  # dealt at random in each class
GROUPED_AT = 224  # pixels: the size at which `audit.py data` looks for near-duplicates


# ---- the run ------------------------------------------------------------------------------------

@dataclass(eq=False)
class Case:
    """A recorded run, checked and built anew as training builds it."""
    folder: Path
    record: dict  # run.json
    why: dict[str, str]  # of each attack that is not tried, the reason
    args: argparse.Namespace | None = None
    run: experiment.Experiment | None = None  # None where no attack is tried
    alone: dict[str, list[Path]] = field(default_factory=dict)  # by fold: the hospitals' own models


def refused(arguments: dict) -> dict[str, str]:
    """Attack → why these arguments of a run do not allow a statement."""
    split, partition = arguments["split"], arguments.get("partition")
    clients, other = arguments.get("clients") or 0, "differ in more than having been trained on"
    for holds, attacks, reason in (
            (arguments.get("site_data"), ATTACKS,
             "hospitals with images of their own (--site-data): nobody has all images"),
            (arguments["bn"] == "local", ATTACKS,
             "--bn local: every hospital has a network of its own, and there is none of all"),
            (split == "stratified80", ATTACKS,
             "--split stratified80: the test part has also chosen the model"),
            (split not in ("random", "stratified"), ATTACKS,
             f"--split {split}: training and test images {other}"),
            ("rounds" not in arguments, ATTACKS[1:], "central training: there are no hospitals"),
            (partition not in EXCHANGEABLE, ATTACKS[1:],
             f"--partition {partition}: images of one hospital and test images {other}"),
            (clients == 1, ATTACKS[1:], "there is no other hospital"),
            (round(arguments.get("fraction", 1) * clients) <= 1, ATTACKS[2:],
             "--fraction: a round has one update, and none beside it")):
        if holds:
            return dict.fromkeys(attacks, reason)
    return {}


def prepare(folder: Path, alone: str | None, replay: bool, place: str | None = None,
            device: str = "auto", cache: str | None = None) -> Case:
    """Build the run of `folder` anew and check it. alone: a run of its hospitals, each alone.
    place: where the images are now. Raises InputError for what is no such run, for other images,
    and where flags and split.csv do not agree."""
    record = run_folder.read_run(folder)
    arguments = record["arguments"]
    case = Case(folder, record, refused(arguments))
    if len(case.why) == len(ATTACKS):
        return case
    if record.get("part_of"):
        raise InputError(f"{folder}: part of a larger run, audit {folder.parent}")
    if arguments.get("local_only"):
        raise InputError(f"{folder}: hospitals alone; audit the run that it is like, with --alone")
    folds = arguments.get("folds", 1) > 1
    case.args = finished.read_arguments(folder / "fold1" if folds else folder, place, cache)
    case.args.device = device
    case.run = experiment.prepare(case.args, Job(), {})
    run_folder.check_images(folder, case.run.images)
    for name, split in case.run.several.items():
        clients = case.run.clients.get(name, [])
        run_folder.check_split(folder / name, case.run.images, split, clients)
        if idle := never_trained(folder / name, len(clients)):
            case.why = dict.fromkeys(ATTACKS, f"hospital(s) {idle} did not train before the round "
                                     "of model.pt: their images are no members (--fraction)")
            case.run = None
            return case
    if arguments.get("partition") not in EXCHANGEABLE:  # hospitals differ by more than chance
        case.run.clients = {name: [] for name in case.run.several}
    if not replay:
        case.why = dict.fromkeys(ATTACKS[2:], "not asked for (--replay 0)") | case.why
    if "A2" not in case.why and alone is not None:
        case.alone = check_alone(Path(alone), case)
    elif "A2" not in case.why:
        case.why["A2"] = ("needs the models that the hospitals train alone: python "
                          f"train_central.py --like {folder} --local-only, then --alone with its "
                          "folder")
    return case


def never_trained(folder: Path, clients: int) -> str:
    """The hospitals whose updates entered no round up to that of model.pt; "" for none."""
    history = finished.read_history(folder)
    rounds = history[:evaluation.best_index(history) + 1]
    trained = {c["client"] for r in rounds for c in r.get("clients", []) if not c["left_out"]}
    return ", ".join(str(k) for k in range(clients) if k not in trained)


def check_alone(folder: Path, case: Case) -> dict[str, list[Path]]:
    """By fold, the folders of the hospitals' own models. InputError unless they were trained on the
    same split and clients with the same recipe and budget, to the end: else they are none."""
    theirs, ours = run_folder.read_run(folder)["arguments"], case.record["arguments"]
    if not theirs.get("local_only"):
        raise InputError(f"--alone {folder}: not a run of train_central.py --like --local-only")
    run_folder.check_images(folder, case.run.images)
    places = {"data", "table", "columns", "skip_unlisted", "device", "bn"}
    other = sorted(name for name in set(theirs) & set(ours) - places if theirs[name] != ours[name])
    other += ["epochs"] if theirs["epochs"] != ours["rounds"] * ours["local_epochs"] else []
    other += ["bn"] if (theirs["bn"] == "freeze") != (ours["bn"] == "freeze") else []
    if other:
        raise InputError(f"--alone {folder}: trained otherwise than {case.folder}: "
                         + ", ".join(f"--{name.replace('_', '-')}" for name in other))
    parts = {}
    for fold, clients in case.run.clients.items():
        parts[fold] = [folder / f"client{k}" / fold for k in range(len(clients))]
        for part, own in zip(parts[fold], clients, strict=True):
            run_folder.read_json(part / "results.json")  # InputError where it is not complete
            run_folder.check_split(part, case.run.images, case.run.several[fold] | {"train": own})
    return parts


def picture_groups(args: argparse.Namespace, images: data.Images) -> np.ndarray:
    """int [N]: duplicate groups of a run's images, as `audit.py data` finds them, at the size for
    which its thresholds were measured. Drawn smears are independent of each other by construction,
    and too alike for those thresholds: of them only identical ones are a group."""
    if args.data is None:
        return duplicates.group(len(images.paths), duplicates.exact_pairs(images.digests))
    if args.image_size != GROUPED_AT or args.remove:
        images = data.load(argparse.Namespace(
            **vars(args) | {"image_size": GROUPED_AT, "remove": []}))
    return duplicates.find_groups(images)[0]


def measure(case: Case, groups: np.ndarray) -> dict:
    """All that `privacy.json` holds. groups: int [N], duplicates or patients of the run's images.
    On the CPU the same numbers every time."""
    out = {"run": case.folder.name, "synthetic": case.record["synthetic"], "not_tried": case.why}
    if case.run is None:
        return out | {"parts": {}}
    run, args = case.run, case.args
    data.keep_on(run.images, run.device)
    start = models.moved(run.model.state_dict(), run.device)  # the network before training
    updates = 0 if "A3" in case.why else 2 * round(args.fraction * args.clients)  # of two rounds
    networks = (3 + len(next(iter(case.alone.values()), [])) + updates) * len(run.several)
    parts = {}
    with tqdm(total=networks, desc="privacy", unit="network", leave=False, disable=None) as bar:
        for name, split in run.several.items():
            sides = membership.make_sides(run.images.labels.numpy(), split, run.clients[name],
                                          groups)
            parts[name] = measure_part(case, name, sides, start, bar.update)
    return out | {"names": run.images.titles(run.clients[name]), "parts": parts}


def measure_part(case: Case, fold: str, sides: Sides, start: models.State,
                 progress: Callable) -> dict:
    """The attacks on the network of one split. start: its state before training."""
    def owned(path: Path) -> np.ndarray:
        case.run.model.load_state_dict(models.read_file(path)["state"])
        return phi(case.run, sides, progress)

    folder, train = case.folder / fold, sides.owner >= 0
    case.run.model.load_state_dict(start)
    before, best = phi(case.run, sides, progress), owned(folder / "model.pt")
    last = owned(folder / "last.pt")[None] if (folder / "last.pt").exists() else None
    every, hospitals = (train & sides.single)[None], list(range(len(case.run.clients[fold])))
    out = {"A1": {
        "best": membership.described(best[None], every, sides),
        "last": None if last is None else membership.described(last, every, sides),
        "hospitals": [membership.attack(best[None], member[None], sides.outside, sides)
                      for member in sides.members(hospitals)],
        "with_partner": membership.attack(best[None], (train & ~sides.single)[None],
                                          ~train & ~sides.single, sides),
        "placebo": membership.attack(before[None], every, sides.outside, sides)}}
    if "A2" not in case.why:
        own = np.stack([owned(part / "model.pt") for part in case.alone[fold]])
        others, members = membership.of_others(own), sides.members(hospitals)
        out["A2"] = membership.described(best - others, members, sides) | {
            "controls": membership.controls(own, hospitals, sides),
            "placebo": membership.attack(before - others, members, sides.outside, sides)}
    if "A3" not in case.why:
        out |= server(case, fold, sides, start, progress)
    return out


def phi(run: experiment.Experiment, sides: Sides, progress: Callable) -> np.ndarray:
    """φ of the images of `sides`, float64 [n], under the state that the network holds."""
    logits = evaluation.predict(run.model, run.images, sides.indices).numpy()
    progress()
    return membership.margin(logits, sides.labels)


# ---- the server: rounds replayed ----------------------------------------------------------------

def replay(case: Case, fold: str, state: models.State, history: list[dict], sides: Sides,
           progress: Callable) -> tuple[dict[int, np.ndarray], list[dict]]:
    """The round after `history`, from `state`, client by client, by the code of training itself:
    (hospital → φ under its own update, float64 [n]; the records of the round)."""
    args, run, round_index = case.args, case.run, len(history) + 1
    counts = run.images.class_counts(run.several[fold]["train"])
    recipe = replace(experiment.weighted(args, run, counts),
                     lr=evaluation.plateau_lr(history, args.lr, args.plateau))
    records, found = [], {}
    for k in fedavg.sample_clients(args.clients, args.fraction, args.seed, round_index):
        update = fedavg.train_client(run.model, state, run.images, run.clients[fold][k], recipe,
                                     (args.seed, round_index, k))
        if fedavg.accept(update, records, {}, []) is not None:  # not finite: left out, as there
            found[k] = phi(run, sides, progress)  # the network still holds the update
    return found, records


def prove(records: list[dict], recorded: list[dict]) -> dict:
    """Whether replayed update norms equal the recorded ones, and the largest relative difference;
    None where they cannot be compared (other clients, other updates that are not finite)."""
    here, there = ({r["client"]: r["update_norm"] for r in rows if r["update_norm"] is not None}
                   for rows in (records, recorded))
    known = here and here.keys() == there.keys() and len(records) == len(recorded)
    return {"equal": bool(known) and here == there, "by": max(
        abs(here[k] - there[k]) / max(abs(there[k]), 1e-300) for k in here) if known else None}


def server(case: Case, fold: str, sides: Sides, start: models.State, progress: Callable) -> dict:
    """A3 and A4, in round 1 and in the round after the last; neither where the replay of round 1
    does not prove itself."""
    folder = case.folder / fold
    found, records = replay(case, fold, start, [], sides, progress)
    recorded = finished.read_history(folder)[0]["clients"]
    here, there = provenance.machine(case.run.device), case.record["machine"]
    proof = prove(records, recorded) | {"differs": {
        key: [there.get(key), value] for key, value in here.items() if there.get(key) != value}}
    if not proof["equal"]:
        return {"replay": proof}
    out = {"replay": proof, "rounds": [of_round(found, 1, sides)]}
    if (folder / "last.pt").exists():
        last = models.read_file(folder / "last.pt")
        state = models.moved(last["state"], case.run.device)
        found, _ = replay(case, fold, state, last["history"], sides, progress)
        out["rounds"].append(of_round(found, last["round"] + 1, sides))
    return out


def of_round(found: dict[int, np.ndarray], round_index: int, sides: Sides) -> dict:
    """A3 and A4 from the updates of one round; None where fewer than two are finite. Before a later
    round its start has seen all hospitals: there the controls say that an update without hospital k
    favours its images no more than another such update does."""
    hospitals = list(found)
    out = {"round": round_index, "hospitals": hospitals, "A3": None, "A4": None}
    if len(hospitals) < 2:
        return out
    updates = np.stack(list(found.values()))
    scores = updates - membership.of_others(updates)
    return out | {
        "A3": membership.described(scores, sides.members(hospitals), sides) | {
            "controls": membership.controls(updates, hospitals, sides),
            "nobody": membership.of_nobody(scores, sides)},
        "A4": membership.sources(updates, hospitals, sides)}
