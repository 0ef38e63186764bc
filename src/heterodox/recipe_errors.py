"""Turning what pydantic says of a recipe into one line for its author."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from heterodox.core.errors import nearest


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem, by its dotted key: what was found, what was expected; and how many more there are."""
    problems = error.errors(include_url=False)
    line = _describe(problems[0], root)
    more = len(problems) - 1
    return line + (f" (and {more} more problem{'s' * (more > 1)})" if more else "")


def _describe(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    path, section = _walk(problem["loc"], root)
    key = ".".join(path) or "recipe"
    found = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}{nearest(path[-1], section.model_fields if section else ())}"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            known = [name.strip(" '") for name in problem["ctx"]["expected_tags"].split(",")]
            return f"{key}.name: there is no {tag!r}{nearest(str(tag), known)}"
        case "union_tag_not_found":
            return f"{key}: says no `name`, so nobody knows which part is meant"
        case "literal_error":
            return f"{key}: found {found!r}, expected {problem['ctx']['expected']}"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
        case "missing":
            return f"{key} is missing"
        case _:
            message = problem["msg"].removeprefix("Input should be ")
            return f"{key}: found {found!r}, expected {message}"


def _walk(loc: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted path without union tags, and the section that holds its last key."""
    path: list[str] = []
    section: type[BaseModel] | None = root
    candidates: list[type[BaseModel]] = []
    for step in loc:
        tagged = [c for c in candidates if len(candidates) > 1 and _tag(c) == step]
        if tagged:
            section, candidates = tagged[0], []
            continue
        if candidates:
            section = candidates[0]
        path.append(str(step))
        field = section.model_fields.get(str(step)) if section else None
        candidates = _sections(field.annotation) if field else []
        if field is None:
            continue
    return path, section


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("name")
    return field.default if field else None


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]
