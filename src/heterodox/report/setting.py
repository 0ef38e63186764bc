"""The setting of a study in a line: model, batch, steps, update, with all values that its recipes have."""

from collections.abc import Mapping, Sequence
from typing import Any

from heterodox.report.study import Study

SHOWN = 3


def setting(study: Study) -> str:
    """What the recipes say of these; nothing for runs that came without their recipes."""
    entries = [entry for header in study.headers for entry in header.get("recipes", [])]
    recipes = [entry["resolved"] for entry in entries if entry.get("resolved")]
    values = {what: _values(recipes, keys) for what, keys in KEYS.items()}
    told = [what.format(_any_of(found)) for what, found in values.items() if found]
    return ", ".join(told)


KEYS = {
    "{}": ("model", "name"),
    "layers {}": ("model", "layers"),
    "heads {}": ("model", "heads"),
    "width {}": ("model", "width"),
    "context {}": ("model", "context"),
    "batch {}": ("run", "batch_size"),
    "steps {}": ("run", "budget", "steps"),
    "warm-up {}": ("run", "warmup_steps"),
    "then {}": ("run", "schedule"),
}


def _values(recipes: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Any]:
    """The different values under these keys, in the recipes' order."""
    found: dict[Any, None] = {}
    for recipe in recipes:
        value: Any = recipe
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[value] = None
    return list(found)


def _any_of(values: Sequence[Any]) -> str:
    shown = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
    if len(values) <= SHOWN or not all(isinstance(value, int) for value in values):
        return " or ".join(shown)
    return f"{min(values):,} to {max(values):,}"
