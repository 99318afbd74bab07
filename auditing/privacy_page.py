"""The page of a privacy audit: report.md, membership.png and server.png, from what was measured."""

import checks  # noqa: F401 - before torch

from pathlib import Path

import numpy as np
from scipy.stats import betabinom

from reporting import figures
from reporting.pages import markdown
from reporting.terminal import show

WHO = {"A1": "whoever holds the final model", "A2": "the other hospitals together",
       "A3": "the server, from one round", "A4": "the server: whose image"}
NULLS = {"controls": "controls", "placebo": "network before training", "nobody": "images of nobody"}
LIMITS = """- An image is no patient. A split by image puts the images of a patient on both sides;
  what tells a patient is then in both arms and cancels. Of patients nothing is
  measured; their risk may be larger.
- The attacks were chosen beforehand. Rows are not corrected for their number. LiRA was not tried.
- The true rate of false alarms is exact for scores as they are. The median of each class, taken
  from the same non-members, makes it approximate.
- No ε follows from an attack. The figures come from private data: a hospital keeps them inside."""


def rows_of(result: dict) -> list[tuple[str, dict | None, bool]]:
    """(name, figure, whether it is a null) of every AUC, in the order of the report."""
    rows = []
    for name, part in result["parts"].items():
        at, names, a1 = f"{name}: " if name else "", result["names"], part["A1"]
        rows += [(f"{at}A1, model.pt", a1["best"], False), (f"{at}A1, last.pt", a1["last"], False)]
        rows += [(f"{at}A1, {who}", figure, False)
                 for who, figure in zip(names, a1["hospitals"], strict=False)]
        rows += [(f"{at}A1, images with a partner in training", a1["with_partner"], False),
                 (f"{at}placebo: before training", a1["placebo"], True)]
        for attack, hospitals, found in compared(result, name):
            rows += [(attack, found, False)]
            rows += [(f"{attack}, {names[k]}", figure, False)
                     for k, figure in zip(hospitals, found["targets"], strict=True)]
            rows += [(f"{attack}, {title}", found[key], True)
                     for key, title in NULLS.items() if key in found]
    return rows


def compared(result: dict, name: str) -> list[tuple[str, list[int], dict]]:
    """(name, hospitals, figure) of A2 and of A3 in each round, of one fold or of the only split."""
    part, at = result["parts"][name], f"{name}: " if name else ""
    rows = [(f"{at}A2", list(range(len(result["names"]))), part["A2"])] if "A2" in part else []
    return rows + [(f"{at}A3, round {one['round']}", one["hospitals"], one["A3"])
                   for one in part.get("rounds", []) if one["A3"]]


def holds(figure: dict) -> bool:
    return figure["low"] is not None and figure["low"] <= 0.5 <= figure["high"]


def null_row(name: str, each: list[dict]) -> list:
    """The row of several nulls: from the lowest to the highest, and how many hold 0.5."""
    known = [one for one in each if one["low"] is not None]
    if not known:
        return [f"*{name}*", "–", "–", "–", "–", "too few images"]
    values, detectable = ([one[key] for one in known] for key in ("value", "detectable"))
    return [f"*{name}*", f"{min(values):.4f} to {max(values):.4f}",
            show(max((x for x in detectable if x), default=None)), "–", "–",
            f"{sum(map(holds, known))} of {len(known)} hold 0.5"]


def said(figure: dict, null: bool) -> str:
    """What an AUC says, in words."""
    if figure["low"] is None:
        return "too few images" if figure["value"] is not None else "no images to compare"
    if null:
        return "holds 0.5" if holds(figure) else "**does not hold 0.5**"
    return "not told apart" if holds(figure) else (
        "**told apart**" if figure["low"] > 0.5 else "below 0.5")


def proof(result: dict) -> str:
    """The first line: whether the replay of round 1 proved itself."""
    every = [part["replay"] for part in result["parts"].values() if "replay" in part]
    line = "Replayed update norms of round 1 equal the recorded ones: "
    if not every:
        return f"{line}not replayed, {result['not_tried'].get('A3')}."
    found = next((one for one in every if not one["equal"]), every[0])  # of folds, the first no
    by = "they cannot be compared" if found["by"] is None else f"by {found['by']:.3g}"
    line += f"**{'yes' if found['equal'] else 'no'}**, {by} (largest relative difference)."
    if found["equal"]:
        return line
    other = ", ".join(f"{key} {there} there, {here} here"
                      for key, (there, here) in found["differs"].items())
    return f"{line} A3 and A4 are not reported. Machine and versions: {other or 'the same'}."


def rate_rows(name: str, rates: list[dict]) -> list[list]:
    """Rows of true positive rates; what so few non-members cannot resolve is said, not guessed."""
    rows = [[name, f"{r['false_positives']} of {r['n']}",
             f"{r['false_low']:.4f}–{r['false_high']:.4f}", f"{r['hits']} of {r['members']}",
             show(r)] for r in rates]
    n = rates[0]["n"] if rates else 0
    if n and (low := [f"{share:.1%}" for share in (0.01, 0.001) if share * n < 1]):
        rows.append([name, ", ".join(low), f"not resolvable below 1/{n} = {1 / n:.4f}", "–", "–"])
    return rows


def page(result: dict) -> list[str]:
    """The sections of report.md."""
    loud = "**SYNTHETIC DATA: this shows the method, not a leak.**\n\n" * result["synthetic"]
    why = [f"- **{attack}** ({WHO[attack]}) is not reported: {reason}"
           for attack, reason in result["not_tried"].items()]
    why += ["- **A1, last.pt** and the round after the last: the run has no last.pt"] * any(
        part["A1"]["last"] is None for part in result["parts"].values())
    sections = [proof(result), f"# What {result['run']} tells of who was in training",
                loud.strip(), "\n".join(why)]
    if not result["parts"]:
        return sections
    rates, sources = [], []
    for name, part in result["parts"].items():
        at = f"{name}: " if name else ""
        rates += rate_rows(f"{at}A1, model.pt", part["A1"]["best"]["targets"][0]["rates"])
        sources += [[f"{at}round {one['round']}", a4["n"], show(a4), show(a4["one_of_k"]),
                     show(a4["largest"]), show(a4["permuted"])]
                    for one in part.get("rounds", []) if (a4 := one["A4"])]
        for attack, hospitals, found in compared(result, name):
            for k, target in zip(hospitals, found["targets"], strict=True):
                rates += rate_rows(f"{attack}, {result['names'][k]}", target["rates"])
    drawn = ["## Whose image (A4)", markdown(
        ["updates of", "images", "attributed rightly (95 %)", "1 of K", "largest hospital",
         "owners permuted within class"], sources), "![server](server.png)"] if sources else []
    return sections + [
        "## Members told from non-members (A1 to A3)",
        "\n".join(f"- **{attack}**: {who}" for attack, who in WHO.items()),
        ("AUC within class: 0.5 tells nothing, 1 everything. On both sides only images without "
         "another image of their group in training. Intervals: bootstrap of whole groups. The "
         "smallest AUC is what these images would have told from 0.5 in 80 of 100 cases."),
        markdown(["attack", "AUC (95 %)", "smallest AUC told from 0.5", "members", "non-members",
                  "in words"], [
            null_row(name, figure["each"]) if "each" in figure else
            [f"*{name}*" if null else name, show(figure), show(figure["detectable"]),
             figure["members"], figure["non_members"], said(figure, null)]
            for name, figure, null in rows_of(result) if figure]),
        "![membership](membership.png)",
        "## Few false alarms",
        markdown(["attack", "false positives", "their true rate (95 %)", "members caught",
                  "true positive rate (95 %)"], rates),
        *drawn, "## What was and was not shown", LIMITS]


def plot_membership(result: dict, path: Path) -> None:
    """ROC from 1/n on, with the band that members drawn at random would stay in (each threshold's
    hits are beta-binomial then); beside it every AUC with its interval, nulls in grey, those of
    one row as points alone."""
    rows = [(name, several, null) for name, figure, null in rows_of(result)[::-1] if figure and (
        several := [x for x in figure.get("each", [figure]) if x["low"] is not None])]
    curves = [(name, x[0]) for name, x, _ in rows[::-1] if x[0].get("curve")]
    with figures.drawing(path, 12, 1.5 + 0.24 * max(len(rows), 12), columns=2) as (roc, aucs):
        for number, (name, figure) in enumerate(curves):
            n, m = len(figure["curve"]), figure["members"]
            k = np.arange(1, n)
            if number == 0:
                low, high = (betabinom.ppf(q, m, k + 1, n - k) / m for q in (0.025, 0.975))
                roc.fill_between(k / n, np.maximum(low, 1e-9), high, color="0.85",
                                 label=f"95 % of {m} members drawn at random")
                roc.axvspan(1 / (3 * n), 1 / n, fill=False, hatch="//", ec="0.6", lw=0)
                roc.set(xscale="log", yscale="log", xlim=(1 / (3 * n), 1), ylim=(1 / n, 1.05))
            roc.plot(k / n, np.maximum(figure["curve"][1:], 1e-9), lw=1.2, label=name)
        roc.plot([1e-6, 1], [1e-6, 1], color="grey", lw=0.8, ls="--", label="chance")
        roc.set(xlabel="false positive rate (hatched: below 1/n, not resolvable)",
                ylabel="true positive rate")
        for axis in (roc.xaxis, roc.yaxis):
            axis.set_major_formatter("{x:g}")  # figures.py draws text as it is, no mathematics
        roc.legend(fontsize=7, loc="lower right")
        for i, (_, several, null) in enumerate(rows):
            values, low, high = (np.array([x[key] for x in several]) for key in
                                 ("value", "low", "high"))
            aucs.errorbar(values, [i] * len(values), fmt="o", ms=4, color="0.6" if null else "C0",
                          xerr=None if len(values) > 1 else np.maximum(
                              [values - low, high - values], 0))
        aucs.axvline(0.5, color="grey", lw=0.8, ls="--")
        aucs.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
        aucs.yaxis.tick_right()
        aucs.set(xlabel="AUC within class (95 %), nulls in grey")


def plot_server(result: dict, path: Path) -> None:
    """A4: whose images (rows) are attributed to whom (columns): number, shaded by share."""
    rounds = [one | {"at": f"{name}: " if name else ""} for name, part in result["parts"].items()
              for one in part.get("rounds", []) if one["A4"]]
    if not rounds:
        return
    with figures.drawing(path, 4.6 * len(rounds), 4.2, columns=len(rounds)) as axes:
        for number, (axis, one) in enumerate(zip(np.atleast_1d(axes), rounds, strict=True)):
            figures.draw_counts(axis, one["A4"]["matrix"],
                                [result["names"][k] for k in one["hospitals"]])
            axis.label_outer()  # the names of the rows stand at the first of several
            axis.set(xlabel="attributed to", ylabel="image of" if number == 0 else "",
                     title=f"{one['at']}updates of round {one['round']}")
