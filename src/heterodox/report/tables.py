"""The share of the way from head_only to the baseline that each recipe has gone, against each cost."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np

from heterodox.report.charts import TITLES, cost_axis, plain
from heterodox.report.data import Run, Study, head_only
from heterodox.report.series import COSTS, Rows, Span, block_of, by_depth, thin
from heterodox.report.statistics import Number, is_finite

LIMITS = (-0.5, 1.5)  # where two curves of the gap nearly touch a share says nothing; it would only flatten the rest


def gaps(study: Study, means: Sequence[dict[str, Any]]) -> dict[str, Rows]:
    """Data set `gaps`: recipe, step, `share` and `cost` for each kind of cost (`kind`), from the mean curves.

    The losses of head_only and of the baseline at a cost are read off their own curves, linearly between evaluations.
    There is no share where the baseline was not trained on, nor where head_only is not the higher one: a recipe that
    costs more FLOPs a token than the baseline is compared by FLOPs only as far as the baseline went. head_only, the
    cheapest and flattest, keeps its last loss beyond its end.
    """
    floor, base = head_only(study), study.baseline
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for row in means:
        by_recipe.setdefault(row["recipe"], []).append(row)
    if floor not in by_recipe or base not in by_recipe or floor == base:
        return {"gaps": []}
    found: Rows = []
    for kind in COSTS:
        for recipe, curve in by_recipe.items():
            if recipe in (floor, base) or study.bounds[recipe] != (floor, base):
                continue
            for row in curve:
                share = _share(row, kind, by_recipe[floor], by_recipe[base])
                if share is not None:
                    found.append(
                        {"recipe": recipe, "kind": kind, "step": row["step"], "cost": row[kind], "share": share}
                    )
    return {"gaps": found}


def gap_chart(cost: str, logarithmic: bool, styles: Sequence[dict[str, Any]], ends: Span) -> dict[str, Any]:
    """The share against `cost`, with axes as the loss chart has them; the page sets `shown`, the recipes."""
    recipes = [style["recipe"] for style in styles]
    shown = alt.param(name="shown", value=recipes)
    scale = alt.Scale(type="log" if logarithmic else "linear", domain=list(ends), nice=False)
    rows = alt.Chart(alt.NamedData(name="gaps")).transform_filter(
        f"datum.kind == '{cost}' && indexof(shown, datum.recipe) >= 0"
    )
    if logarithmic:
        rows = rows.transform_filter("datum.cost > 0")
    tooltip = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("share:Q", title="of the gap", format=".1%"),
        alt.Tooltip("cost:Q", title=cost, format=".3s"),
        alt.Tooltip("step:Q", format=","),
    ]
    lines = rows.mark_line(point=alt.OverlayMarkDef(size=36), strokeWidth=2.2, clip=True).encode(
        x=alt.X("cost:Q", scale=scale, axis=cost_axis(TITLES[cost])),
        y=alt.Y("share:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title="share of the gap closed", format="%")),
        color=alt.Color("recipe:N", scale=alt.Scale(domain=recipes), legend=None),
        strokeDash=alt.StrokeDash(
            "recipe:N", scale=alt.Scale(domain=recipes, range=[style["dash"] for style in styles]), legend=None
        ),
        tooltip=tooltip,
    )
    chart = lines.properties(width="container", height=280, description=f"Share of the gap closed against {cost}")
    return plain(chart.add_params(shown))


def _share(row: dict[str, Any], kind: str, floor: Rows, base: Rows) -> Number | None:
    at = row[kind]
    low, high = _at(base, kind, at), _at(floor, kind, at, beyond=True)
    if low is None or high is None or high <= low:
        return None
    share = (high - row["loss"]) / (high - low)
    return share if LIMITS[0] <= share <= LIMITS[1] else None


def _at(curve: Rows, kind: str, cost: Number | None, beyond: bool = False) -> float | None:
    points = [(row[kind], row["loss"]) for row in curve if is_finite(row[kind])]
    if cost is None or len(points) < 2 or cost < points[0][0] or (cost > points[-1][0] and not beyond):
        return None
    costs, losses = zip(*points, strict=True)
    return float(np.interp(cost, costs, losses))


# The manifests as one grid: where each parameter's signal comes from, under each recipe.


MEANINGS = {
    "exact": "the true gradient, from what the layer itself sees",
    "backprop": "the true gradient, carried back through the transposed weights of other layers",
    "feedback": "carried by fixed or learned feedback weights; in general not the true gradient",
    "equilibrium": "read off relaxed states",
    "critic": "proposed by a learned network",
    "local": "from what the layer itself sees, and not the true gradient",
    "perturbation": "measured by perturbing weights or activities",
    "random": "a random direction",
    "frozen": "none: the parameter does not move",
}


def origins(study: Study) -> dict[str, Any]:
    """`recipes` with the share of parameters per origin, and the `rows` of the grid, from the input on.

    A row stands for one parameter of every block; a cell is a list of (origin, where) and has more than one
    entry only where blocks, or weight and bias, differ. `where` names the blocks or parts then, and is empty
    otherwise.
    """
    manifests = {}
    for recipe in study.recipes:
        found = next((run.manifest["parameters"] for run in study.of(recipe) if run.manifest.get("parameters")), None)
        if found:
            manifests[recipe] = found
    names = by_depth(name for parameters in manifests.values() for name in parameters)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), []).append(name)
    rows = [
        {"name": pattern, "cells": [_cell(members, manifests[recipe]) for recipe in manifests]}
        for pattern, members in groups.items()
    ]
    shares = [{"recipe": recipe, "shares": _shares(parameters)} for recipe, parameters in manifests.items()]
    used = {origin for entry in shares for origin, _ in entry["shares"]}
    legend = [(origin, meaning) for origin, meaning in MEANINGS.items() if origin in used]
    return {"recipes": shares, "rows": rows, "legend": legend}


def _pattern(name: str) -> str:
    name = re.sub(r"\.(weight|bias)$", "", name)
    return name if block_of(name + ".") is None else re.sub(r"\.\d+(?=\.)", ".*", name, count=1)


def _cell(members: list[str], parameters: dict[str, Any]) -> list[tuple[str, str]]:
    by_origin: dict[str, list[str]] = {}
    for name in members:
        if name in parameters:
            by_origin.setdefault(parameters[name]["origin"], []).append(name)
    if len(by_origin) < 2:
        return [(origin, "") for origin in by_origin]
    blocks = {origin: {block_of(name) for name in names} for origin, names in by_origin.items()}
    apart = sum(map(len, blocks.values())) == len(set().union(*blocks.values()))
    if apart:
        return [(origin, _ranges(sorted(b for b in found if b is not None))) for origin, found in blocks.items()]
    last = {origin: dict.fromkeys(name.rsplit(".", 1)[-1] for name in names) for origin, names in by_origin.items()}
    return [(origin, ", ".join(parts)) for origin, parts in last.items()]


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0–2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _shares(parameters: dict[str, Any]) -> list[tuple[str, float]]:
    sizes = dict.fromkeys(MEANINGS, 0)
    for entry in parameters.values():
        sizes[entry["origin"]] = sizes.get(entry["origin"], 0) + (entry.get("size") or 0)
    total = sum(sizes.values())
    return [(origin, size / total) for origin, size in sizes.items() if size] if total else []


# Resolved recipes, and what sets each apart from the baseline's.


SAME = ("name", "description", "seed", "log")  # keys that differ by nature and say nothing


def recipes(study: Study) -> list[dict[str, Any]]:
    """Name, description, YAML and the keys that differ from the baseline's, for each recipe's first seed."""
    base = next((run.config for run in study.runs if run.recipe == study.baseline), None)
    entries = []
    for recipe in study.recipes:
        run = study.of(recipe)[0]
        description = study.descriptions.get(recipe) or run.config.get("description") or ""
        differences = _differences(base, run.config) if base and recipe != study.baseline else []
        entries.append({"recipe": recipe, "description": description, "yaml": run.yaml, "differences": differences})
    return entries


def _differences(base: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(dotted key, the baseline's value, this recipe's value) where the two differ; absent is empty."""
    ours, theirs = dict(_flat(config)), dict(_flat(base))
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if key.split(".")[0] not in SAME]
    return [(key, theirs.get(key, ""), ours.get(key, "")) for key in keys if theirs.get(key) != ours.get(key)]


def _flat(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", _scalar(value)


def _scalar(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


# Sparse runs: where their connections are, how far they have looked, and what the search decided.


MaskRows = list[dict[str, Any]]
STEPS = 120
COURSES = ("explored", "overlap", "density", "dead")
COUNTED = ("child_wins", "below_parent", "upsets")


def masks(study: Study) -> dict[str, dict[str, Any]]:
    """By recipe with masks: `steps`, `layers` from input to output, and mean `density[layer][step]` over the seeds."""
    return {recipe: _densities(runs) for recipe in study.recipes if (runs := _masked(study, recipe))}


def mask_courses(study: Study) -> dict[str, MaskRows]:
    """Data sets of the charts: `courses` of single runs over their steps, `decisions` of searches by candidate."""
    courses = [_course(run, row) for run in study.runs for row in thin(run.masks, STEPS)]
    return {"courses": courses, "decisions": [row for run in study.runs for row in _decisions(run)]}


def mask_table(study: Study) -> MaskRows:
    """A line for each recipe with masks, averaged over its runs; None where there is nothing to tell."""
    return [_line(recipe, runs) for recipe in study.recipes if (runs := _masked(study, recipe))]


def _masked(study: Study, recipe: str) -> list[Run]:
    runs = [run for run in study.of(recipe) if run.masks]
    return [run for run in runs if run.finished] or runs


def _densities(runs: Sequence[Run]) -> dict[str, Any]:
    steps = thin(sorted({row["step"] for run in runs for row in run.masks}), STEPS)
    layers = by_depth(name for run in runs for row in run.masks for name in row.get("layers") or {})
    found: dict[tuple[str, int], list[Number]] = {}
    for row in (row for run in runs for row in run.masks):
        for name, layer in (row.get("layers") or {}).items():
            found.setdefault((name, row["step"]), []).append(layer["active"] / layer["size"])
    density = [[_mean(found.get((name, step), [])) for step in steps] for name in layers]
    return {"steps": steps, "layers": layers, "density": density}


def _course(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    density = row["active"] / row["size"] if row.get("size") else None
    told = {"explored": row.get("explored"), "overlap": row.get("overlap"), "density": density, "dead": _dead(row)}
    return {"recipe": run.recipe, "seed": run.seed, "step": row["step"]} | told


def _decisions(run: Run) -> MaskRows:
    """Each candidate's loss against that of its parent; below 0 is better."""
    parents = {row["step"]: row.get("ce") for row in run.candidates if row.get("candidate") == 0}
    rows = []
    for row in run.candidates:
        parent = parents.get(row["step"])
        if row.get("candidate") and is_finite(parent) and is_finite(row.get("ce")):
            what = "reset" if row.get("reset") else "swap"
            told = {"step": row["step"], "change": row["ce"] - parent, "won": bool(row.get("won")), "what": what}
            rows.append({"recipe": run.recipe, "seed": run.seed} | told)
    return rows


def _line(recipe: str, runs: Sequence[Run]) -> dict[str, Any]:
    last = [run.masks[-1] for run in runs]
    changes = [row for run in runs for row in run.masks[1:]]
    shares = [
        run.summary["search_seconds"] / run.summary["seconds"]
        for run in runs
        if is_finite(run.summary.get("search_seconds")) and run.summary.get("seconds")
    ]
    decisions = [row for run in runs for row in _decisions(run)]
    return {
        "recipe": recipe,
        "connections": _mean([row["active"] for row in last]),
        "density": _mean([row["active"] / row["size"] for row in last]),
        "explored": _mean([row["explored"] for row in last]),
        "overlap": _mean([row["overlap"] for row in changes]),
        "dead": _mean([_dead(row) for row in last]),
        "events": _mean([len(run.masks) - 1 for run in runs]),
        **{name: _mean([row.get(name) for row in last]) for name in COUNTED},
        "gain": _mean([row["change"] for row in decisions if row["won"]]),
        "search": _mean(shares),
        "sparse_flops": _mean([run.summary["sparse_flops"] for run in runs if run.summary.get("sparse_flops")]),
    }


def _dead(row: dict[str, Any]) -> int:
    """Units of all matrices without any incoming, or any outgoing connection."""
    return sum(layer["dead_outputs"] + layer["dead_inputs"] for layer in (row.get("layers") or {}).values())


def _mean(values: Sequence[Number | None]) -> float | None:
    known = [value for value in values if is_finite(value)]
    return float(f"{sum(known) / len(known):.6g}") if known else None


# What rules report of themselves beside loss and gradient norm, as curves over steps.
#
# A metric `quantity/part` is one of several curves in the chart of its quantity; one without a part has a chart alone.


USUAL = {"kind", "step", "tokens", "meta_tokens", "flops", "sparse_flops", "seconds", "lr", "loss", "grad_norm"}
POINTS = 200  # per curve


def monitor(study: Study) -> list[dict[str, Any]]:
    """A chart for each recipe and quantity: `recipe`, `quantity`, `parts` in order, `rows` of part, step and value.

    Values are means over the finished seeds (all seeds, if none finished) that logged a finite one at that step.
    """
    found = []
    for recipe in study.recipes:
        runs = [run for run in study.of(recipe) if run.finished] or study.of(recipe)
        for quantity, parts in _quantities(runs).items():
            rows = [
                {"part": part, "step": step, "value": value}
                for part, curve in parts.items()
                for step, value in thin(curve, POINTS)
            ]
            found.append({"recipe": recipe, "quantity": quantity, "parts": list(parts), "rows": rows})
    return found


def _quantities(runs: list[Run]) -> dict[str, dict[str, list[tuple[int, Number]]]]:
    values: dict[tuple[str, str], dict[int, list[Number]]] = {}
    for row in (row for run in runs for row in run.steps):
        for key, value in row.items():
            if key not in USUAL and is_finite(value):
                quantity, _, part = key.partition("/")
                values.setdefault((quantity, part), {}).setdefault(row["step"], []).append(value)
    quantities: dict[str, dict[str, list[tuple[int, Number]]]] = {}
    for (quantity, part), by_step in values.items():
        curve = [(step, sum(found) / len(found)) for step, found in sorted(by_step.items())]
        quantities.setdefault(quantity, {})[part] = curve
    return quantities


# What the raters of a study have learned: AUC by kind of known noise over the run, and how scores are spread.


AUC = "auc_"


def raters(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Data sets: `aucs` by recipe, seed, kind and step; `scores`, bins by recipe and kind of its first run."""
    aucs = [
        {"recipe": run.recipe, "seed": run.seed, "step": row["step"], "kind": key.removeprefix(AUC), "auc": value}
        for run in study.runs
        for row in thin(run.evals)
        for key, value in row.items()
        if key.startswith(AUC) and is_finite(value)
    ]
    scores = []
    for recipe in study.recipes:
        found: dict[str, Any] = next((run.scores for run in study.of(recipe) if run.scores), {})
        edges = found.get("edges", [])
        for kind, counts in found.get("counts", {}).items():
            total = sum(counts) or 1
            bins = zip(edges, edges[1:], counts, strict=False)
            rows = [{"low": low, "high": high, "share": count / total} for low, high, count in bins]
            scores += [{"recipe": recipe, "kind": kind} | row for row in rows]
    return {"aucs": aucs, "scores": scores}
