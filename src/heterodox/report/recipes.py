"""Resolved recipes, and what sets each apart from the baseline's."""

import json
from collections.abc import Iterator
from typing import Any

from heterodox.report.study import Study

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
