"""Values as a recipe's file can hold them."""

from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from heterodox.core.errors import RecipeError


def plain(value: Any) -> Any:
    """A copy of the value in lists, dicts, strings and numbers, from paths, configs and arrays, too.

    Raises RecipeError for what has no such form.
    """
    try:
        return to_jsonable_python(value, fallback=lambda other: other.tolist())
    except (PydanticSerializationError, AttributeError, ValueError, RecursionError):
        raise RecipeError(f"{repr(value)[:80]} cannot stand in a recipe") from None
