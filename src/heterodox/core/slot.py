"""A slot: one question of a recipe, and the parts that answer it.

Parts are the package's own, or come from outside: an installed distribution that declares the entry point
`NAME = "module:Class"` in the group `heterodox.SLOT` gives that slot the part NAME. It is imported when somebody names
it, and not before.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from heterodox.core.errors import RecipeError

# The base of every recipe section.


MOST = 1 << 63
"""The largest whole number that an option can be."""


class Config(BaseModel):
    """A frozen record that refuses unknown keys. A part's own `Config` has `name: Literal[...]` and `build(...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_only_where_they_are_meant(cls, data: Any) -> Any:
        """`top_k: true` would otherwise be read as 1, and a number of hundreds of digits overflow later."""
        for key, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, int) and abs(value) > MOST:
                raise ValueError(f"{key} is a number of more than {len(str(MOST)) - 1} digits, too large for anything")
            field = cls.model_fields.get(key)
            kinds = {field.annotation, *get_args(field.annotation)} if field else set()
            if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{key} is {str(value).lower()}, expected a number")
        return data

    def in_float32(self) -> list[str]:
        """Return what this part computes in float32 under `run.precision: bfloat16`; nothing by default."""
        return []

    def refusals(self, recipe: "Config") -> list[str]:
        """Reasons why this part cannot run within `recipe` (the whole one); none by default."""
        return []


PREFIX = "heterodox."


@cache
def declared() -> Mapping[str, Mapping[str, Sequence[EntryPoint]]]:
    """Entry points by slot and name."""
    every, found = entry_points(), {}
    for group in every.groups:
        if group.startswith(PREFIX):
            names = found.setdefault(group.removeprefix(PREFIX), {})
            for point in every.select(group=group):
                names.setdefault(point.name, []).append(point)
    return found


def part_config(part: type) -> type[Config]:
    """A part's recipe section."""
    return part.Config  # pyrefly: ignore[missing-attribute]


def part_name(part: type) -> str:
    """The name by which recipes call a part."""
    return part_config(part).model_fields["name"].default


class Slot:
    """The parts of a slot. As metadata of a recipe's field, it lets the sections of plug-ins in."""

    def __init__(self, name: str, contract: type, parts: Sequence[type]) -> None:
        """`parts` are the package's own; `contract` has the methods that every part must have."""
        self.name = name
        self.contract = contract
        self.own = {part_name(part): part for part in parts}
        self.configs = tuple(part_config(part) for part in parts)

    @property
    def plugins(self) -> list[str]:
        """Names of the parts from outside, those that cannot be used among them."""
        return sorted(declared().get(self.name, {}))

    def is_plugin(self, name: str) -> bool:
        """Return whether the part `name` comes from another distribution."""
        return name not in self.own and name in declared().get(self.name, {})

    @property
    def names(self) -> list[str]:
        return [*self.own, *(name for name in self.plugins if name not in self.own)]

    def distribution(self, name: str) -> tuple[str, str] | None:
        """Which distribution the part `name` from outside belongs to, and its version; None for our own part."""
        points = declared().get(self.name, {}).get(name, ())
        if name in self.own or not points or points[0].dist is None:
            return None
        return points[0].dist.name, points[0].dist.version

    def get(self, name: object) -> type | None:
        """The part called `name`, or None. Raises `RecipeError` where it is declared twice or is not a part."""
        points = declared().get(self.name, {}).get(name, ()) if isinstance(name, str) else ()
        own = self.own.get(name) if isinstance(name, str) else None
        if not points:
            return own
        places = [_place(point) for point in points]
        if own is not None:
            places = [f"{own.__module__}:{own.__qualname__} of heterodox itself", *places]
        if len(places) > 1:
            raise RecipeError(
                f"{self.name} {name!r} is there twice: {' and '.join(places)}; rename or uninstall one of them"
            )
        return self._load(points[0])

    def _load(self, point: EntryPoint) -> type:
        what = f"{self.name} {point.name!r} is declared as {_place(point)}"
        try:
            part = point.load()
        except (Exception, SystemExit) as error:  # whatever a module may raise
            raise RecipeError(f"{what}, which cannot be imported: {type(error).__name__}: {error}") from error
        problem = self._problem(part, point.name)
        if problem:
            raise RecipeError(f"{what}, which is not a part: {problem}")
        return part

    def _problem(self, part: object, name: str) -> str | None:
        """What `part` lacks to be one of this slot."""
        if not isinstance(part, type):
            return f"it is a {type(part).__name__}, expected a class"
        config = getattr(part, "Config", None)
        if not (isinstance(config, type) and issubclass(config, Config)):
            return "it has no nested class Config that inherits heterodox.core.slot.Config"
        if "name" not in config.model_fields or config.model_fields["name"].default != name:
            return f"its Config says no `name: Literal[{name!r}] = {name!r}`"
        if not callable(getattr(config, "build", None)):
            return "its Config has no method `build`"
        missing = [method for method in _methods(self.contract) if not hasattr(part, method)]
        return f"it has no {', '.join(missing)}, which {self.contract.__name__} asks for" if missing else None

    def section(self) -> Any:
        """The type of this slot's section in a recipe: any of its parts' configurations, told apart by `name`."""
        union: Any = reduce(or_, self.configs)
        return Annotated[union, Field(discriminator="name"), self] if len(self.configs) > 1 else Annotated[union, self]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validates the section of a plug-in by the plug-in's own Config, and writes it out as what it is."""
        as_it_is = core_schema.wrap_serializer_function_ser_schema(
            lambda value, serialize: serialize(value), schema=core_schema.any_schema()
        )
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source), serialization=as_it_is)

    def _validate(self, value: Any, own: Callable[[Any], BaseModel]) -> BaseModel:
        name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
        part = None if isinstance(value, self.configs) else self.get(name)
        if part is None or name in self.own:
            return own(value)
        try:
            return part_config(part).model_validate(value)
        except ValidationError as error:  # with the name in its path, as errors in our own parts have it
            problems: list[Any] = [{**problem, "loc": (name, *problem["loc"])} for problem in error.errors()]
            raise ValidationError.from_exception_data(error.title, problems) from None


def _place(point: EntryPoint) -> str:
    """`module:Class of distribution 1.0`."""
    return point.value + (f" of {point.dist.name} {point.dist.version}" if point.dist else "")


def _methods(contract: type) -> Iterator[str]:
    """The public methods that `contract` and our classes above it define."""
    for above in contract.__mro__:
        if above.__module__.startswith("heterodox."):
            yield from (name for name, value in vars(above).items() if inspect.isfunction(value) and name[0] != "_")
