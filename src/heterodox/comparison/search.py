"""What a sweep tries: values by dotted key, their combinations, and names for them."""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from heterodox.core.errors import RecipeError
from heterodox.core.plain import plain
from heterodox.recipe import parse_value

Settings = dict[str, Any]
"""Values by dotted key."""
NOT_SETTINGS = ("name", "seed", "description", "tuning", "log")
LONGEST = 100
"""Characters of a trial's name, which names a folder."""


def parse_search(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=VALUE,VALUE,...` arguments as values by key. Raises `RecipeError` for what is not of that form."""
    search: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key or not text.strip():
            raise RecipeError(f"--search {argument!r} is not of the form KEY=VALUE,VALUE")
        if key in search:
            raise RecipeError(f"--search {key} is there twice; give all its values at once")
        try:
            search[key] = parse_value(f"[{text}]")
        except ValueError:
            raise RecipeError(f"--search {argument!r}: the values are not YAML") from None
    return search


def check_search(search: Mapping[str, Any], overrides: Sequence[str], trials: int | None) -> dict[str, list[Any]]:
    """The values as plain data. Raises `RecipeError` where there is nothing to search by them."""
    if not search:
        raise RecipeError("nothing to search: give --search KEY=VALUE,VALUE, e.g. --search update.lr=1e-3,3e-3,1e-2")
    if trials is not None and trials < 1:
        raise RecipeError(f"a sweep needs at least one trial, found {trials}")
    given = {override.partition("=")[0] for override in overrides}
    if "name" in given:
        raise RecipeError("a sweep gives its trials names of its own; drop name=")
    found = {key: _values(key, values) for key, values in search.items()}
    for key, values in found.items():
        if key.partition(".")[0] in NOT_SETTINGS:
            raise RecipeError(f"{key} is no setting of a rule, so there is nothing to search")
        if key in given:
            raise RecipeError(f"{key} is searched and overridden; drop one")
        if not values:
            raise RecipeError(f"{key}: no values to try")
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise RecipeError(f"{key}: {word(twice[0])} is there twice")
    return found


def combinations(search: Mapping[str, Sequence[Any]], trials: int | None) -> list[Settings]:
    """All combinations of the values, or `trials` of them at random, in the grid's order.

    The draw is the same at every call, and a longer one has a shorter one in it.
    """
    sizes = [len(values) for values in search.values()]
    number = math.prod(sizes)
    if trials is None or trials >= number:
        return [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]
    generator, drawn = random.Random(0), set[int]()
    while len(drawn) < trials:
        drawn.add(generator.randrange(number))
    return [_at(search, sizes, index) for index in sorted(drawn)]


def tried(search: Mapping[str, Sequence[Any]], chosen: Sequence[Settings]) -> dict[str, list[Any]]:
    """The values that occur in what was chosen."""
    return {key: [value for value in values if any(s[key] == value for s in chosen)] for key, values in search.items()}


def told(settings: Settings) -> str:
    """Settings as a person writes them."""
    return ", ".join(f"{key}={word(value)}" for key, value in settings.items())


def word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def trial_name(rule: str, settings: Settings) -> str:
    """A name that says the settings, as far as a name can, and is no other trial's."""
    label = "-".join([rule, *(f"{key.rpartition('.')[2]}-{word(value)}" for key, value in settings.items())])
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", label)
    if name == label and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _values(key: str, values: object) -> list[Any]:
    try:
        found = plain(values)
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from None
    if not isinstance(found, list):
        raise RecipeError(f"{key}: found {found!r}, expected a list of values to try")
    return found


def _at(search: Mapping[str, Sequence[Any]], sizes: Sequence[int], index: int) -> Settings:
    """The combination at this place of the grid, the last key changing fastest."""
    places = []
    for size in reversed(sizes):
        index, place = divmod(index, size)
        places.append(place)
    return {key: values[place] for (key, values), place in zip(search.items(), reversed(places), strict=True)}
