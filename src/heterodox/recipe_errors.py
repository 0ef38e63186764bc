"""Turning what pydantic says of a recipe into one line for its author."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from heterodox.core.errors import nearest
from heterodox.core.slot import Slot, part_config

_LONGEST = 80  # characters of a value that a message repeats


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem, by its dotted key: what was found, what was expected; and how many more there are."""
    problems = error.errors(include_url=False)
    line = _describe(problems[0], root)
    more = len(problems) - 1
    return line + (f" (and {more} more problem{'s' * (more > 1)})" if more else "")


def _describe(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    path, section = _walk(problem["loc"], root)
    key = ".".join(path) or "recipe"
    found = repr(problem["input"])
    if len(found) > _LONGEST:
        found = found[:_LONGEST] + "…"
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}{_nearest_key(path, section, root)}"
        case "invalid_key":
            return f"unknown key {key!r}{_nearest_key(path, root, root)}"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            known = [name.strip(" '") for name in problem["ctx"]["expected_tags"].split(",")]
            known += [name for slot in _slots(section, path[-1]) for name in slot.plugins]
            return f"{key}.name: there is no {tag!r}{nearest(str(tag), known)}"
        case "union_tag_not_found":
            return f"{key}: says no `name`, so nobody knows which part is meant"
        case "literal_error":
            return f"{key}: found {found}, expected {problem['ctx']['expected']}"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
        case "missing":
            return f"{key} is missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key}: found {found}, expected keys with values"
        case "string_pattern_mismatch":
            return f"{key}: found {found}, expected something like {problem['ctx']['pattern']}"
        case "path_type" | "string_type":
            return f"{key}: found {found}, expected text; put it in quotes"
        case _:
            message = problem["msg"].removeprefix("Input should be ").partition(",")[0]
            return f"{key}: found {found}, expected {message}"


def _nearest_key(unknown: Sequence[str], section: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """A hint at a key of `section` like the last word of `unknown`, or else at a key of that very name elsewhere."""
    word = unknown[-1]
    known = section.model_fields if section else ()
    if not difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        for path in sorted(_leaves(root), key=lambda path: (len(path), path[0] != "run")):  # what every run has
            if path[-1] == word and path != tuple(unknown):  # another part of this slot may have that key
                return f"; did you mean {'.'.join(path)!r}?"
    return nearest(word, known)


def _leaves(section: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, field in section.model_fields.items():
        yield (*above, key)
        for inner in sections_of(field.annotation):
            yield from _leaves(inner, (*above, key))


def _walk(loc: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted path without union tags, and the section that holds its last key."""
    path: list[str] = []
    section: type[BaseModel] | None = root
    candidates: list[type[BaseModel]] = []
    slots: list[Slot] = []
    for step in loc:
        outside = [slot.get(step) for slot in slots if step in slot.plugins and step not in slot.own]
        if outside and outside[0]:
            section, candidates, slots = part_config(outside[0]), [], []
            continue
        tagged = [c for c in candidates if len(candidates) > 1 and _tag(c) == step]
        if tagged:
            section, candidates, slots = tagged[0], [], []
            continue
        if candidates:
            section = candidates[0]
        path.append(str(step))
        field = section.model_fields.get(str(step)) if section else None
        candidates = sections_of(field.annotation) if field else []
        slots = _slots(section, str(step))
    return path, section


def _slots(section: type[BaseModel] | None, key: str) -> list[Slot]:
    """The slot that the field `key` holds a part of, if it does."""
    field = section.model_fields.get(key) if section else None
    return [mark for mark in field.metadata if isinstance(mark, Slot)] if field else []


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("name")
    return field.default if field else None


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_of(argument)]
