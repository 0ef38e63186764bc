"""The manifests as one grid: where each parameter's signal comes from, under each recipe."""

import re
from typing import Any

from heterodox.report.alignment import block_of, by_depth
from heterodox.report.study import Study

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
