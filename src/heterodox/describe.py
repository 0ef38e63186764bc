"""What the catalogue says of itself: the answers of `heterodox list` and `heterodox explain`."""

import inspect
import sys
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from heterodox import catalog
from heterodox.core.errors import RecipeError, nearest
from heterodox.core.rng import Streams
from heterodox.recipe import check


def list_catalog() -> list[dict[str, str]]:
    """Slot, name and one-line description of every part."""
    return [
        {"slot": slot, "name": catalog.part_name(part), "description": _module_doc(part).split("\n")[0]}
        for slot, parts in catalog.PARTS.items()
        for part in parts
    ]


def explain_part(name: str) -> dict[str, Any]:
    """Slot, module documentation and options of the part called `name`, and a credit rule's manifest on a small model.

    Raises `RecipeError` for a name that the catalogue does not have.
    """
    found = catalog.find(name)
    if not found:
        known = [catalog.part_name(part) for parts in catalog.PARTS.values() for part in parts]
        raise RecipeError(f"there is no part {name!r}{nearest(name, known)}")
    if len(found) > 1:
        raise RecipeError(f"{name!r} is in several slots: say {' or '.join(f'{slot}.{name}' for slot, _ in found)}")
    slot, part = found[0]
    config = catalog.part_config(part)
    answer: dict[str, Any] = {
        "slot": slot,
        "name": catalog.part_name(part),
        "documentation": _module_doc(part),
        "options": [option for option in _options(config) if option["name"] != "name"],
    }
    if slot == "credit":
        answer["manifest"] = _manifest(part)
    return answer


def _options(section: type[BaseModel], prefix: str = "") -> Iterator[dict[str, Any]]:
    """Name, type, default and description of every option, those of the sections within included."""
    for key, field in section.model_fields.items():
        inner = _section(field.annotation)
        if not isinstance(field.default, BaseModel):  # else what is in it says it all
            yield {
                "name": prefix + key,
                "type": "section | None" if inner else _type_name(field.annotation),
                "default": "(required)" if field.is_required() else field.default,
                "description": field.description or "",
            }
        if inner:
            yield from _options(inner, f"{prefix}{key}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an option holds, if it may hold one."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _manifest(part: type) -> dict[str, str]:
    """Where each parameter's signal comes from, at the rule's default options, in the first model that it can train."""
    streams, sizes = Streams(0), {"layers": 1, "heads": 1, "width": 8, "context": 4}
    for model_part in catalog.PARTS["model"]:
        try:
            recipe = check(
                {"credit": catalog.part_name(part), "model": {"name": catalog.part_name(model_part)} | sizes}
            )
        except RecipeError:
            continue
        model = recipe.model.build(16, streams)
        return dict(recipe.credit.build(model, streams).manifest(model))
    raise AssertionError(f"no model for {part}")


def _module_doc(part: type) -> str:
    return inspect.cleandoc(sys.modules[part.__module__].__doc__ or "")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if annotation is type(None):
        return "None"
    return getattr(origin or annotation, "__name__", str(annotation))
