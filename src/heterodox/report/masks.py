"""Sparse runs: where their connections are, how far they have looked, and what the search decided."""

from collections.abc import Sequence
from typing import Any

from heterodox.comparison.statistics import Number, is_finite
from heterodox.report.alignment import by_depth
from heterodox.report.curves import thin
from heterodox.report.read import Run
from heterodox.report.study import Study

Rows = list[dict[str, Any]]
STEPS = 120
COURSES = ("explored", "overlap", "density", "dead")
COUNTED = ("child_wins", "below_parent", "upsets")


def masks(study: Study) -> dict[str, dict[str, Any]]:
    """By recipe with masks: `steps`, `layers` from input to output, and mean `density[layer][step]` over the seeds."""
    return {recipe: _densities(runs) for recipe in study.recipes if (runs := _masked(study, recipe))}


def mask_courses(study: Study) -> dict[str, Rows]:
    """Data sets of the charts: `courses` of single runs over their steps, `decisions` of searches by candidate."""
    courses = [_course(run, row) for run in study.runs for row in thin(run.masks, STEPS)]
    return {"courses": courses, "decisions": [row for run in study.runs for row in _decisions(run)]}


def mask_table(study: Study) -> Rows:
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


def _decisions(run: Run) -> Rows:
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
