"""Writes the tables of docs/recipes.md from the recipe's own models: python docs/make_reference.py [--check]"""

import sys
import types
import typing
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from heterodox.app import catalog
from heterodox.app.recipe import SLOTS, Recipe
from heterodox.core.slot import part_config, part_name

PAGE = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- tables: python docs/make_reference.py -->\n", "<!-- end of tables -->\n"
MEANINGS = {  # of keys whose name says nearly all, so that the code does not
    "model.solver": "plain Euler steps, or Anderson's mixture of the last ones",
    "credit.solver": "as `model.solver`",
    "credit.feedback": "how feedback matrices are drawn",
    "credit.elsewhere": "how embeddings and norms learn: [rules](rules/feedback_alignment.md)",
}
SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    fresh = before + BEGIN + "\n" + "\n".join(tables()) + "\n" + END + after
    if "--check" in sys.argv:
        sys.exit(0 if fresh == page else "docs/recipes.md is out of date: python docs/make_reference.py")
    PAGE.write_text(fresh, encoding="utf-8")


def tables() -> typing.Iterator[str]:
    """A heading and a table for the recipe itself, for each part of each slot, and for each other section."""
    fields = Recipe.model_fields
    for_itself = [key for key, field in fields.items() if section(field.annotation) is None and key not in SLOTS]
    yield from table("The recipe itself", [(key, fields[key], fields[key].default) for key in for_itself])
    for slot in SLOTS:
        for part in catalog.PARTS[slot]:
            config = part_config(part)
            chosen = " (default)" if isinstance(fields[slot].default, config) else ""
            options = [row for row in rows(config, f"{slot}.") if row[0] != f"{slot}.name"]
            yield from table(f"`{slot}: {part_name(part)}`{chosen}", options)
    for part in catalog.PARTS["topology"]:
        options = [row for row in rows(part_config(part), "update.topology.") if row[0][-5:] != ".name"]
        yield from table(f"`update.topology: {part_name(part)}`", options)
    for key in ("run", "log", "tuning"):
        model = section(fields[key].annotation)
        assert model is not None
        yield from table(f"`{key}`", list(rows(model, f"{key}.")))


Row = tuple[str, FieldInfo, typing.Any]


def rows(model: type[BaseModel], prefix: str, given: BaseModel | None = None) -> typing.Iterator[Row]:
    """Dotted key, field and default of everything in a section, the sections within it included."""
    for key, field in model.model_fields.items():
        default = field.default if given is None else getattr(given, key)
        inner = section(field.annotation)
        if inner is None:
            yield prefix + key, field, default
        else:
            if default is None:
                yield prefix + key, field, default
            yield from rows(inner, f"{prefix}{key}.", default)


def section(annotation: typing.Any) -> type[BaseModel] | None:
    """The section that a field holds, if it is one."""
    candidates = [annotation, *typing.get_args(annotation)]
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return found[0] if len(found) == 1 else None


def table(title: str, listed: list[Row]) -> typing.Iterator[str]:
    yield f"### {title}\n"
    if not listed:
        yield "No options.\n"
        return
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key, field, default in listed:
        yield f"| `{key}` | {kind(field)} | {shown(default)} | {field.description or MEANINGS.get(key, '')} |"
    yield ""


def kind(field: FieldInfo) -> str:
    """The type with its limits: `int ≥ 1 | null`."""
    limits = "".join(
        f" {sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for bound, (sign, name) in SIGNS.items()
        if isinstance(limit, bound)
    )
    first, bar, rest = spell(field.annotation).partition(" \\| null")
    return first + limits + bar + rest


def spell(annotation: typing.Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(spell(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and "name" in annotation.model_fields:
        return f"`{annotation.model_fields['name'].default}`"
    if section(annotation) is not None:
        return "section"
    name = (origin or annotation).__name__
    return {"str": "text", "dict": "mapping"}.get(name, name)


def shown(default: typing.Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    default = getattr(default, "name", default)
    return f"`{default}`" if default != "" else ""


if __name__ == "__main__":
    main()
