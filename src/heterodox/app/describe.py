"""What the catalogue says of itself: the answers of `heterodox list` and `heterodox explain`."""

import inspect
import sys
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from heterodox.app import catalog
from heterodox.app.recipe import check
from heterodox.core.errors import RecipeError, nearest
from heterodox.core.rng import Streams
from heterodox.core.slot import Slot, declared, part_config, part_name


def list_catalog() -> list[dict[str, str]]:
    """Slot, name, one-line description and distribution of every part; of one that cannot be used, why."""
    stray = {title: Slot(title, object, ()) for title in sorted(declared().keys() - catalog.SLOTS.keys())}
    return [
        {
            "slot": title,
            "name": name,
            "description": _in_a_line(slot, name),
            "distribution": " ".join(slot.distribution(name) or ("heterodox",)),
        }
        for title, slot in (catalog.SLOTS | stray).items()
        for name in slot.names
    ]


def _in_a_line(slot: Slot, name: str) -> str:
    if slot.name not in catalog.SLOTS:
        return f"cannot be used: there is no slot {slot.name!r}{nearest(slot.name, catalog.SLOTS)}"
    try:
        part = slot.get(name)
    except RecipeError as error:
        return f"cannot be used: {error}"
    assert part is not None
    return _documentation(part).split("\n")[0]


def explain_part(name: str) -> dict[str, Any]:
    """Slot, module documentation and options of the part called `name`, and a credit rule's manifest on a small model.

    Raises `RecipeError` for a name that the catalogue does not have, or of a part that cannot be used.
    """
    found = catalog.find(name)
    if not found:
        known = [name for slot in catalog.SLOTS.values() for name in slot.names]
        raise RecipeError(f"there is no part {name!r}{nearest(name, known)}")
    if len(found) > 1:
        raise RecipeError(f"{name!r} is in several slots: say {' or '.join(f'{slot}.{name}' for slot, _ in found)}")
    slot, part = found[0]
    config = part_config(part)
    answer: dict[str, Any] = {
        "slot": slot,
        "name": part_name(part),
        "documentation": _documentation(part),
        "options": [option for option in _options(config) if option["name"] != "name"],
    }
    manifest = _manifest(part) if slot == "credit" else None
    return answer | ({"manifest": manifest} if manifest else {})


def _options(section: type[BaseModel], prefix: str = "") -> Iterator[dict[str, Any]]:
    """Name, type, default and description of every option, those of the sections within included."""
    for key, field in section.model_fields.items():
        inner = _section(field.annotation)
        default = "(required)" if field.is_required() else field.default
        given = isinstance(default, BaseModel)
        yield {
            "name": prefix + key,
            "type": ("section" if given else "section | None") if inner else _type_name(field.annotation),
            "default": getattr(default, "name", "") if given else default,
            "description": field.description or "",
        }
        if inner:
            yield from _options(inner, f"{prefix}{key}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an option holds, if it may hold one, and no other."""
    candidates = (annotation, *get_args(annotation))
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return found[0] if len(found) == 1 else None


def _manifest(part: type) -> dict[str, str] | None:
    """Where each parameter's signal comes from, at the rule's default options, in the first model that it can train.

    None for a rule from outside that needs options, or a model, which nobody but its author knows.
    """
    streams, sizes = Streams(0), {"layers": 1, "heads": 1, "width": 8, "context": 4}
    for model_part in catalog.PARTS["model"]:
        try:
            recipe = check({"credit": part_name(part), "model": {"name": part_name(model_part)} | sizes})
        except RecipeError:
            continue
        model = recipe.model.build(16, streams)
        return dict(recipe.credit.build(model, streams).manifest(model))
    return None


def _documentation(part: type) -> str:
    """Return what a part says of itself: on its class, or, if that says less, on its module."""
    module = inspect.getdoc(sys.modules[part.__module__]) or ""
    return max(inspect.cleandoc(part.__doc__ or ""), module, key=len)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and "name" in annotation.model_fields:
        return annotation.model_fields["name"].default
    return getattr(origin or annotation, "__name__", str(annotation))
