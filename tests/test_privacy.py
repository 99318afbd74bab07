"""The privacy audit against known answers: a network that memorises, and one that cannot."""

from checks import InputError

import csv
import json
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from helpers import PLAIN, average, clone, equal, plain_net, toy_images, write_tree
from PIL import Image
from scipy.stats import betabinom
from torch import nn

import audit
import data
import fedavg
import models
import train_central
import train_federated
from auditing import membership, privacy, privacy_page
from dataset import splits
from reporting import figures, report, run_folder
from reporting.finished import read_history


@torchvision.models._api.register_model()
def memonet(weights: None = None, num_classes: int = 1000) -> nn.Module:
    """Large enough to learn random labels of noise by heart."""
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), hidden=nn.Linear(192, 256), relu=nn.ReLU(),
                                     fc=nn.Linear(256, num_classes)))


memonet.__module__ = "torchvision.models.memonet"
MEMORY = ["--model", "memonet", "--weights", "none", "--image-size", "8", "--batch-size", "16",
          "--lr", "0.001", "--augment", "none", "--plateau", "0", "--early-stop", "0", "--amp",
          "off"]
SAID = "Replayed update norms of round 1 equal the recorded ones:"


# ---- the replay ---------------------------------------------------------------------------------

def test_the_average_of_one_update_is_that_clients_state_bit_for_bit():
    images, model = toy_images(37), plain_net()
    update = fedavg.train_client(model, clone(model.state_dict()), images, np.arange(37), PLAIN,
                                 (0, 1, 0))
    own = clone(update.state)
    assert equal(average([(own, 37)]), own)


@pytest.mark.parametrize(("here", "there", "expected"), [
    ([1.0, 2.0], [1.0, 2.0], {"equal": True, "by": 0}),
    ([1.0, 2.5], [1.0, 2.0], {"equal": False, "by": 0.25}),
    ([0.5, 0.0], [0.25, 0.0], {"equal": False, "by": 1}),
    ([1.0, None], [1.0, 2.0], {"equal": False, "by": None}),
    ([1.0, None], [1.0, None], {"equal": True, "by": 0}),
    ([None], [None], {"equal": False, "by": None}),
    ([1.0], [1.0, 2.0], {"equal": False, "by": None})])
def test_a_replay_proves_itself_by_equal_norms(here, there, expected):
    rows = [[{"client": k, "update_norm": x} for k, x in enumerate(norms)]
            for norms in (here, there)]
    assert privacy.prove(*rows) == expected


def test_of_several_folds_the_first_that_is_not_replayed_is_told():
    replays = [{"equal": True, "by": 0, "differs": {}},
               {"equal": False, "by": 0.25, "differs": {"threads": [2, 1]}},
               {"equal": False, "by": 0.5, "differs": {}}]
    result = {"parts": {f"fold{i}": {"replay": one} for i, one in enumerate(replays)}}
    line = privacy_page.proof(result)
    assert "**no**, by 0.25 (" in line and line.endswith("threads 2 there, 1 here.")
    result["parts"] = {"fold0": {"replay": replays[0]}}
    assert "**yes**, by 0 (" in privacy_page.proof(result)


@pytest.mark.parametrize(("low", "high", "plain", "null"), [
    (0.4, 0.6, "not told apart", "holds 0.5"), (0.5, 0.6, "not told apart", "holds 0.5"),
    (0.51, 0.6, "**told apart**", "**does not hold 0.5**"),
    (0.3, 0.5, "not told apart", "holds 0.5"),
    (0.3, 0.49, "below 0.5", "**does not hold 0.5**")])
def test_words_beside_an_auc(low, high, plain, null):
    figure = {"value": 0.5, "low": low, "high": high}
    assert privacy_page.said(figure, False) == plain and privacy_page.said(figure, True) == null


def test_words_where_there_is_no_interval():
    none = {"low": None, "high": None}
    for null in (False, True):
        assert privacy_page.said({"value": 0.7, **none}, null) == "too few images"
        assert privacy_page.said({"value": None, **none}, null) == "no images to compare"


@pytest.mark.parametrize(("n", "rest"), [
    (40, ["1.0%, 0.1%", "not resolvable below 1/40 = 0.0250", "–", "–"]),
    (100, ["0.1%", "not resolvable below 1/100 = 0.0100", "–", "–"]), (1000, None)])
def test_what_so_few_images_cannot_resolve_is_said(n, rest):
    rates = [{"false_positives": 0, "n": n, "false_low": 0.0, "false_high": 0.0123, "hits": 3,
              "members": 40, "value": 0.075, "low": 0.0157, "high": 0.2039}]
    rows = [["A1", f"0 of {n}", "0.0000–0.0123", "3 of 40", "0.0750 (0.0157–0.2039)"]]
    assert privacy_page.rate_rows("A1", rates) == rows + ([["A1", *rest]] if rest else [])
    assert privacy_page.rate_rows("A1", []) == []


# ---- whole runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """The trainers' figures are not the subject here, and cost seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_run", "draw_pooled"):
            patch.setattr(report, name, lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A federated run that memorises noise with random labels, its hospitals alone, a table of the
    groups (one of two images), and the audit's folder."""
    base = tmp_path_factory.mktemp("privacy")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(400):
        path = base / "set" / "abcd"[rng.integers(4)] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        paths.append(path.relative_to(base / "set").as_posix())
    with open(base / "groups.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path", "group"], *([p, p] for p in paths)])
    run, alone = base / "run", base / "alone"
    train_federated.main(["--data", str(base / "set"), *MEMORY, "--rounds", "3", "--local-epochs",
                          "10", "--out", str(run)])
    train_central.main(["--like", str(run), "--local-only", "--out", str(alone)])
    audit.main(["privacy", str(run), "--alone", str(alone), "--table", str(base / "groups.csv")])
    return base


def read(folder):
    return json.loads((folder / "privacy.json").read_text("utf-8"))


def measure(*arguments):
    """The audit without its figures."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_membership", "plot_server"):
            patch.setattr(privacy_page, name, lambda *arguments: None)
        audit.main(["privacy", *map(str, arguments)])


def again(runs, tmp_path, change, *arguments):
    """The audit of a copy of the run after `change(folder)`: (privacy.json, report.md)."""
    folder = shutil.copytree(runs / "run", tmp_path / "run",
                             ignore=shutil.ignore_patterns("privacy*"))
    change(folder)
    measure(folder, "--table", runs / "groups.csv", *arguments)
    return read(folder / "privacy"), (folder / "privacy" / "report.md").read_text("utf-8")


def rewrite(**arguments):
    def change(folder):
        run = json.loads((folder / "run.json").read_text("utf-8"))
        run["arguments"] |= arguments
        (folder / "run.json").write_text(json.dumps(run), "utf-8")
    return change


def test_a_network_that_memorises_is_caught_by_all_attacks(runs):
    part = read(runs / "run" / "privacy")["parts"][""]
    rounds = part["rounds"]
    assert part["A1"]["best"]["members"] == 320 and part["A1"]["best"]["non_members"] == 40
    assert part["A1"]["last"]["value"] > 0.95 and part["A2"]["value"] > 0.95
    assert [one["round"] for one in rounds] == [1, 4]
    assert rounds[1]["A3"]["value"] > 0.95 and rounds[0]["A3"]["value"] > 0.95
    assert rounds[1]["A4"]["value"] > 0.9 and rounds[0]["A4"]["n"] == 320
    assert len(part["A1"]["hospitals"]) == len(part["A2"]["targets"]) == 4
    assert all(target["value"] > 0.9 for target in part["A2"]["targets"])


def test_the_figures_are_those_of_the_definition_pair_by_pair(runs):
    """A1, A2 and the placebo of hospital 2 anew, from the files, in plain loops."""
    part = read(runs / "run" / "privacy")["parts"][""]
    case = privacy.prepare(runs / "run", None, replay=False)
    images, labels = case.run.images, case.run.images.labels.numpy()
    owned, test = case.run.clients[""][2], case.run.several[""]["test"]

    def phi(path):
        if path is not None:
            case.run.model.load_state_dict(models.read_file(path / "model.pt")["state"])
        with torch.no_grad():
            batch = data.eval_batch(images, torch.arange(400), torch.device("cpu"))
            p = case.run.model(batch).double().softmax(1)[torch.arange(400), images.labels]
        return (p.log() - (1 - p).log()).numpy()

    def share(score):
        pairs = [(score[i] > score[j]) + 0.5 * (score[i] == score[j])
                 for i in owned for j in test if labels[i] == labels[j]]
        return np.mean(pairs)
    before, best = phi(None), phi(runs / "run")
    others = np.mean([phi(runs / "alone" / f"client{k}") for k in (0, 1, 3)], 0)
    assert part["A1"]["hospitals"][2]["value"] == pytest.approx(share(best), abs=1e-3)
    assert part["A2"]["targets"][2]["value"] == pytest.approx(share(best - others), abs=1e-3)
    own, rest = phi(runs / "alone" / "client0"), [1, 3]
    control = own - np.mean([phi(runs / "alone" / f"client{k}") for k in rest], 0)
    found = next(one for one in part["A2"]["controls"]["each"]
                 if (one["model"], one["images"]) == (0, 2))
    assert found["value"] == pytest.approx(share(control), abs=1e-3)
    models_alone = [phi(runs / "alone" / f"client{k}") for k in range(4)]
    pairs, less = [], []
    for k, own in enumerate(case.run.clients[""]):
        rest = before - np.mean(models_alone[:k] + models_alone[k + 1:], 0)
        same = [(i, j) for i in own for j in test if labels[i] == labels[j]]
        pairs += [before[i] > before[j] for i, j in same]
        less += [rest[i] > rest[j] for i, j in same]
    assert part["A1"]["placebo"]["value"] == pytest.approx(np.mean(pairs), abs=1e-3)
    assert part["A2"]["placebo"]["value"] == pytest.approx(np.mean(less), abs=1e-3)


def test_placebo_and_controls_hold_one_half(runs):
    """A leak of the audit itself, such as test images that were trained on, turns this red."""
    part = read(runs / "run" / "privacy")["parts"][""]
    nulls = [part["A1"]["placebo"], part["A2"]["placebo"]]
    assert all(map(privacy_page.holds, nulls)), nulls
    nobody = [one for r in part["rounds"] for one in r["A3"]["nobody"]["each"]]
    assert len(nobody) == 8 and sum(map(privacy_page.holds, nobody)) >= 6
    each = part["A2"]["controls"]["each"] + part["rounds"][0]["A3"]["controls"]["each"]
    assert len(each) == 24 and sum(map(privacy_page.holds, each)) >= 20
    for one in part["rounds"]:
        assert one["A4"]["permuted"]["low"] <= 0.25 <= one["A4"]["permuted"]["high"]


def test_the_replay_equals_the_history_and_the_report_begins_with_it(runs):
    found, folder = read(runs / "run" / "privacy"), runs / "run" / "privacy"
    assert found["parts"][""]["replay"] == {"equal": True, "by": 0.0, "differs": {}}
    page = (folder / "report.md").read_text("utf-8")
    assert page.startswith(f"{SAID} **yes**, by 0 (")
    assert "Of patients nothing is" in page and "not resolvable below 1/40 = 0.0250" in page
    assert {p.name for p in folder.iterdir()} == {"report.md", "privacy.json", "membership.png",
                                                  "server.png"}
    assert found["not_tried"] == {} and found["names"] == [f"client {k}" for k in range(4)]


def test_the_report_has_a_row_for_every_figure(runs):
    result = read(runs / "run" / "privacy")
    clients = [f"client {k}" for k in range(4)]
    attacks = [("A2", ["network before training"]), ("A3, round 1", ["images of nobody"]),
               ("A3, round 4", ["images of nobody"])]
    names = [("A1, model.pt", False), ("A1, last.pt", False),
             *((f"A1, {who}", False) for who in clients),
             ("A1, images with a partner in training", False), ("placebo: before training", True)]
    for attack, nulls in attacks:
        names += [(attack, False), *((f"{attack}, {who}", False) for who in clients),
                  (f"{attack}, controls", True), *((f"{attack}, {n}", True) for n in nulls)]
    assert [(name, null) for name, _, null in privacy_page.rows_of(result)] == names
    text = (runs / "run" / "privacy" / "report.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    heads = [i for i, line in enumerate(rows) if line.startswith("| ---")]
    assert len(heads) == 3 and heads[1] - heads[0] - 2 == len(names)
    for (name, null), line in zip(names, rows[heads[0] + 1:], strict=False):
        assert line.startswith(f"| *{name}* |" if null else f"| {name} |")
    best = result["parts"][""]["A1"]["best"]
    assert rows[heads[0] + 1] == (
        f"| A1, model.pt | {best['value']:.4f} ({best['low']:.4f}–{best['high']:.4f}) | "
        f"{best['detectable']:.4f} | 320 | 40 | **told apart** |")
    assert "SYNTHETIC" not in text and "is not reported" not in text
    assert "SYNTHETIC" in "".join(privacy_page.page(result | {"synthetic": True}))
    a4 = result["parts"][""]["rounds"][1]["A4"]
    assert rows[-1] == (
        f"| round 4 | 320 | {a4['value']:.4f} ({a4['low']:.4f}–{a4['high']:.4f}) | 0.2500 | "
        f"{a4['largest']:.4f} | {a4['permuted']['value']:.4f} "
        f"({a4['permuted']['low']:.4f}–{a4['permuted']['high']:.4f}) |")


def test_what_the_figures_draw(runs, tmp_path, monkeypatch):
    """The band is where 320 members drawn at random lie, at 1 to 39 false alarms of 40."""
    drawn, result = [], read(runs / "run" / "privacy")
    monkeypatch.setattr(figures, "save", lambda figure, path, dpi: drawn.append(figure))
    privacy_page.plot_membership(result, tmp_path / "membership.png")
    privacy_page.plot_server(result, tmp_path / "server.png")
    (roc, aucs), servers = drawn[0].axes, drawn[1].axes
    band = roc.collections[0].get_paths()[0].vertices
    for k in (1, 20, 39):
        chances = np.cumsum(betabinom(320, k + 1, 40 - k).pmf(np.arange(321)))
        expected = [int(np.argmax(chances >= q)) / 320 for q in (0.025, 0.975)]
        there = band[band[:, 0] == k / 40, 1]
        assert [there.min(), there.max()] == pytest.approx(expected, abs=1e-8)
    part = result["parts"][""]
    line = roc.lines[0]
    assert [x.get_label() for x in roc.lines] == [
        "A1, model.pt", "A1, last.pt", "A2", "A3, round 1", "A3, round 4", "chance"]
    assert line.get_xdata().tolist() == [k / 40 for k in range(1, 40)]
    assert line.get_ydata().tolist() == part["A1"]["best"]["curve"][1:]
    assert roc.get_xlim() == (1 / 120, 1) and roc.get_ylim() == (1 / 40, 1.05)
    rows = [row[1].get("each", [row[1]]) for row in privacy_page.rows_of(result)]
    rows = [row for row in rows if row[0]["low"] is not None]
    points = [tuple(xy) for line in aucs.lines if line.get_marker() == "o"
              for xy in line.get_xydata()]
    assert points == [(x["value"], i) for i, row in enumerate(rows[::-1]) for x in row]
    assert sorted({len(row) for row in rows}) == [1, 4, 12]
    bars = [segment for bar in aucs.collections for segment in bar.get_segments()]
    assert len(bars) == sum(len(row) == 1 for row in rows)  # many in one row would hide each other
    assert [[int(t.get_text()) for t in axis.texts] for axis in servers] == [
        np.ravel(one["A4"]["matrix"]).tolist() for one in part["rounds"]]


def test_the_round_after_the_last_is_the_one_that_a_longer_run_trains(runs, tmp_path):
    for rounds in ("3", "4"):
        train_federated.main(["--data", str(runs / "set"), *MEMORY, "--plateau", "1", "--lr",
                              "0.01", "--rounds", rounds, "--local-epochs", "2", "--out",
                              str(tmp_path / rounds)])
    history = read_history(tmp_path / "4")
    assert history[3]["lr"] < history[0]["lr"]  # the schedule is followed, too
    case = privacy.prepare(tmp_path / "3", None, replay=True)
    last = models.read_file(tmp_path / "3" / "last.pt")
    case_sides = membership.make_sides(case.run.images.labels.numpy(), case.run.several[""],
                                       case.run.clients[""], np.arange(400))
    found, records = privacy.replay(case, "", last["state"], last["history"], case_sides, str)
    assert privacy.prove(records, history[3]["clients"]) == {"equal": True, "by": 0.0}
    assert list(found) == [0, 1, 2, 3] and {len(phi) for phi in found.values()} == {360}


def test_the_same_command_writes_the_same_bytes_into_a_numbered_folder(runs, monkeypatch):
    bars, bar = [], privacy.tqdm
    monkeypatch.setattr(privacy, "tqdm", lambda **more: bars.append(bar(
        **more | {"disable": False})) or bars[0])
    measure(runs / "run", "--alone", runs / "alone", "--table", runs / "groups.csv")
    assert bars[0].n == bars[0].total > 0  # the progress bar ends where it says
    for name in ("privacy.json", "report.md"):
        assert ((runs / "run" / "privacy" / name).read_bytes()
                == (runs / "run" / "privacy-2" / name).read_bytes())


def test_a_changed_seed_is_reported_and_not_used(runs, tmp_path):
    found, page = again(runs, tmp_path, rewrite(seed=1))
    part = found["parts"][""]
    assert not part["replay"]["equal"] and part["replay"]["by"] > 1e-6 and "rounds" not in part
    assert page.splitlines()[0].startswith(
        f"{SAID} **no**, by ")
    assert "A3 and A4 are not reported" in page.splitlines()[0]
    assert "| A3" not in page and "Whose image (A4)" not in page
    assert "--local-only" in found["not_tried"]["A2"]  # no --alone was given


def test_a_hospital_that_never_trained_has_no_members(runs, tmp_path):
    def change(folder):
        history = read_history(folder)
        for record in history:
            record["clients"][2]["left_out"] = True
        run_folder.write_history(folder, history)
    found, page = again(runs, tmp_path, change)
    assert found["parts"] == {} and page.count("hospital(s) 2 did not train before the round") == 5
    assert privacy.never_trained(runs / "run", 6) == "4, 5"  # of four


def test_only_for_images_that_are_not_there_it_is_asked_where_they_are(runs, tmp_path):
    with pytest.raises(InputError, match="absent.pt: no such file$"):
        again(runs, tmp_path, rewrite(weights="absent.pt"))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(InputError, match="absent: no such folder .images that were moved: --data"):
        again(runs, tmp_path, rewrite(data="absent"))


def test_a_run_without_its_last_state_says_so(runs, tmp_path):
    found, page = again(runs, tmp_path, lambda folder: (folder / "last.pt").unlink())
    part = found["parts"][""]
    assert part["A1"]["last"] is None and [one["round"] for one in part["rounds"]] == [1]
    assert "the run has no last.pt" in page


def test_a_cross_validation_is_taken_fold_by_fold(runs, tmp_path):
    folds = tmp_path / "folds"
    train_central.main(["--data", str(runs / "set"), *MEMORY, "--folds", "2", "--epochs", "10",
                        "--out", str(folds)])
    audit.main(["privacy", str(folds), "--table", str(runs / "groups.csv")])
    found = read(folds / "privacy")
    assert list(found["parts"]) == ["fold1", "fold2"]
    assert {k: "no hospitals" in v for k, v in found["not_tried"].items()} == {
        "A2": True, "A3": True, "A4": True}
    for part in found["parts"].values():
        assert part["A1"]["best"]["value"] > 0.9 and privacy_page.holds(part["A1"]["placebo"])
        assert part["A1"]["best"]["non_members"] == 200 and "rounds" not in part
    assert "fold2: A1, model.pt" in (folds / "privacy" / "report.md").read_text("utf-8")
    with pytest.raises(InputError, match="part of a larger run, audit"):
        measure(folds / "fold1")


def test_a_federated_cross_validation_is_taken_fold_by_fold_by_all_attacks(runs, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    train_federated.main(["--data", str(runs / "set"), *MEMORY, "--folds", "2", "--clients", "2",
                          "--rounds", "1", "--local-epochs", "10", "--out", str(run)])
    train_central.main(["--like", str(run), "--local-only", "--out", str(alone)])
    measure(run, "--alone", alone, "--table", runs / "groups.csv")
    found = read(run / "privacy")
    assert list(found["parts"]) == ["fold1", "fold2"] and found["not_tried"] == {}
    for part in found["parts"].values():
        assert part["replay"]["equal"] and [one["round"] for one in part["rounds"]] == [1, 2]
        assert part["A2"]["value"] > 0.9 and part["rounds"][0]["A4"]["value"] > 0.9
        assert privacy_page.holds(part["A2"]["placebo"])
    page = (run / "privacy" / "report.md").read_text("utf-8")
    assert page.startswith(f"{SAID} **yes**") and "| fold2: A3, round 2, client 1 |" in page


@pytest.mark.parametrize(("changed", "attacks", "words"), [
    ({"split": "grouped"}, 4, "--split grouped"), ({"split": "blocked"}, 4, "--split blocked"),
    ({"split": "given"}, 4, "--split given"), ({"split": "stratified80"}, 4, "chosen the model"),
    ({"bn": "local"}, 4, "--bn local"), ({"site_data": ["A=x", "B=y"]}, 4, "--site-data"),
    ({"partition": "given"}, 3, "--partition given"),
    ({"partition": "stain"}, 3, "--partition stain"), ({"clients": 1}, 3, "no other hospital"),
    ({"fraction": 0.25}, 2, "--fraction"), ({"fraction": 0.5}, 0, ""),
    ({"partition": "shards"}, 0, ""), ({"split": "stratified"}, 0, "")])
def test_what_allows_no_statement_is_one_line(runs, changed, attacks, words):
    arguments = json.loads((runs / "run" / "run.json").read_text("utf-8"))["arguments"]
    why = privacy.refused(arguments | changed)
    assert list(why) == list(privacy.ATTACKS)[4 - attacks:]
    assert all(words in reason and "\n" not in reason for reason in why.values())


def test_where_nothing_can_be_said_nothing_is_computed(runs, tmp_path):
    found, page = again(runs, tmp_path, rewrite(split="blocked", data="nowhere"))
    assert found["parts"] == {} and page.count("is not reported: --split blocked") == 4
    assert page.startswith(f"{SAID} not replayed")
    assert {p.name for p in (tmp_path / "run" / "privacy").iterdir()} == {"privacy.json",
                                                                          "report.md"}


def test_every_partition_of_today_is_dealt_at_random_within_a_class():
    assert set(privacy.EXCHANGEABLE) == set(splits.PARTITIONS) - {"stain"}


def test_the_models_trained_alone_must_be_of_the_same_split_and_budget(runs, tmp_path):
    run, alone = runs / "run", shutil.copytree(runs / "alone", tmp_path / "alone")
    plain = [run, "--replay", 0, "--alone"]
    with pytest.raises(InputError, match="not a run of train_central.py --like --local-only"):
        measure(*plain, run)
    kept = (alone / "run.json").read_text("utf-8")
    for changed, words in (({"epochs": 29}, "--epochs"), ({"lr": 0.1}, "--lr"),
                           ({"bn": "freeze"}, "--bn")):
        rewrite(**changed)(alone)
        with pytest.raises(InputError, match=f"trained otherwise than .*: {words}$"):
            measure(*plain, alone)
        (alone / "run.json").write_text(kept, "utf-8")
    (alone / "client2" / "results.json").unlink()
    with pytest.raises(InputError, match="client2: .*has no results.json"):
        measure(*plain, alone)
    place = alone / "client1" / "split.csv"
    place.write_text(place.read_text("utf-8").replace(",train,", ",val,", 1), "utf-8")
    with pytest.raises(InputError, match="do not give its split or clients"):
        measure(*plain, alone)
    with pytest.raises(InputError, match="hospitals alone"):
        measure(alone)


def test_replay_can_be_left_out_and_moved_images_found(runs, tmp_path):
    found, page = again(runs, tmp_path, rewrite(data=str(tmp_path / "gone")), "--replay", "0",
                        "--data", str(runs / "set"))
    assert "rounds" not in found["parts"][""] and "--replay 0" in page.splitlines()[0]
    with pytest.raises(InputError, match="--data DIR"):
        measure(tmp_path / "run", "--replay", 0)


def test_duplicates_are_grouped_as_the_audit_of_the_data_groups_them(tmp_path):
    """Copies on disk, at a size where near-duplicates cannot be told; drawn smears never are."""
    tree = write_tree(tmp_path / "set", {"a": 20, "b": 20}, size=64)
    for i in range(3):
        shutil.copy(tree / "a" / f"a-{i + 1:03d}.png", tree / "a" / f"again-{i}.png")
    small = [*MEMORY, "--rounds", "1", "--local-epochs", "1", "--clients", "2"]
    train_federated.main(["--data", str(tree), *small, "--out", str(tmp_path / "run")])
    case = privacy.prepare(tmp_path / "run", None, replay=False)
    groups, paths = privacy.picture_groups(case.args, case.run.images), case.run.images.paths
    assert len(set(groups)) == 40
    assert all(groups[paths.index(f"a/again-{i}.png")] == groups[paths.index(f"a/a-00{i + 1}.png")]
               for i in range(3))
    train_federated.main([*small, "--out", str(tmp_path / "drawn")])
    case = privacy.prepare(tmp_path / "drawn", None, replay=False)
    assert privacy.picture_groups(case.args, case.run.images).tolist() == list(range(320))
