"""Recipes: a YAML file plus dotted overrides, checked as a whole before anything runs."""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from heterodox import catalog
from heterodox.core.config import Config
from heterodox.core.errors import RecipeError
from heterodox.core.plain import plain
from heterodox.data import DataConfig
from heterodox.recipe_errors import one_line
from heterodox.run.config import LogConfig, RunConfig

SLOTS = ("model", "objective", "rating", "credit", "update", "learner")


class Tuning(Config):
    """How this recipe's settings were found, for the sceptic."""

    trials: int = Field(ge=0, description="runs spent on this rule")
    seeds: int = Field(1, ge=1, description="seeds of each trial")
    searched: dict[str, list[Any]] = Field({}, description="values tried, by dotted key")
    note: str = Field("", description="anything else")


class Recipe(Config):
    """Everything that a run depends on."""

    name: str = Field(
        "unnamed",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="how the run is called; default: the file's name",
    )
    description: str = Field("", description="a sentence for the report")
    seed: int = Field(0, ge=0, description="of all random streams")
    data: DataConfig = DataConfig()  # pyrefly: ignore[missing-argument]
    model: catalog.ModelConfig = catalog.GPT.Config()  # pyrefly: ignore[missing-argument]
    objective: catalog.ObjectiveConfig = catalog.CrossEntropy.Config()
    rating: catalog.RatingConfig = catalog.Uniform.Config()
    credit: catalog.CreditConfig = catalog.Backprop.Config()
    update: catalog.UpdateConfig = catalog.AdamW.Config()  # pyrefly: ignore[missing-argument]
    learner: catalog.LearnerConfig = catalog.Gradient.Config()  # pyrefly: ignore[missing-argument]
    run: RunConfig = RunConfig()  # pyrefly: ignore[missing-argument]
    log: LogConfig = LogConfig()
    tuning: Tuning | None = None

    @field_validator(*SLOTS, mode="before")
    @classmethod
    def _with_name(cls, value: object, info: Any) -> object:
        """`credit: x` is short for `credit: {name: x}`; a part without a name is the slot's default."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "name" not in value:
            return {"name": cls.model_fields[info.field_name].default.name, **value}
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Recipe":
        for slot, name in self.chosen().items():
            catalog.SLOTS[slot].get(name)  # a default, too, must mean one part alone
        reasons = [reason for slot in SLOTS for reason in getattr(self, slot).refusals(self)]
        if reasons:
            raise ValueError("; ".join(reasons))
        return self

    def chosen(self) -> dict[str, str]:
        """The name of the part in each slot."""
        sections = {slot: getattr(self, slot) for slot in SLOTS}
        sections |= {"corpus": self.data.corpus, "tokenizer": self.data.tokenizer}
        if hasattr(self.update, "topology"):
            sections["topology"] = self.update.topology
        return {slot: section.name for slot, section in sections.items()}

    def distributions(self) -> dict[str, str]:
        """Versions of the distributions, other than this one, that the recipe's parts come from."""
        found = (catalog.SLOTS[slot].distribution(name) for slot, name in self.chosen().items())
        return dict(pair for pair in found if pair is not None)

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return write_yaml(self.dump())


Source = str | Path | Mapping[str, Any] | Recipe
"""A recipe: a YAML file, plain data, or a `Recipe`."""


def load_recipe(source: Source, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, a dict, or a recipe, with `KEY=VALUE` overrides on top.

    Raises `RecipeError` with one line that names the key, what was found and the nearest valid key.
    """
    return check(overridden(source, overrides))


def overridden(source: Source, overrides: Iterable[str]) -> dict[str, Any]:
    """What the source says, over its base and below the overrides, without defaults and not checked."""
    if isinstance(source, Recipe):
        data: dict[str, Any] = source.dump()
    elif isinstance(source, Mapping):
        data = plain(dict(source))
    else:
        data = read(Path(source))
        data.setdefault("name", Path(source).stem)
    for override in sorted(overrides, key=_breadth):
        apply_override(data, override)
    return data


def check(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(one_line(error, Recipe)) from None


def read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The raw content of a recipe file, laid over the file that its `base:` names."""
    if path.resolve() in above:
        raise RecipeError(f"recipe {path} is its own base")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        where = " ".join(str(error).replace('in "<unicode string>", line', "in line").split())
        raise RecipeError(f"recipe {path} is not YAML: {where}") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"recipe {path} holds {found}, expected a mapping of sections")
    for key in data:
        if not isinstance(key, str):
            raise RecipeError(f"recipe {path}: unknown key {key!r}, expected a word")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise RecipeError(f"recipe {path} names the base {base!r}, and there is no such file beside it")
    return merge(read(path.parent / base, (*above, path.resolve())), data)


def merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, key by key. A part of another name replaces the base's part as a whole."""
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        if isinstance(below, str) and isinstance(value, dict):  # `credit: x` is short for `credit: {name: x}`
            below = {"name": below}
        if isinstance(below, dict) and isinstance(value, str):
            value = {"name": value}
        both = isinstance(below, dict) and isinstance(value, dict)
        if both and key != "budget" and value.get("name", below.get("name")) == below.get("name"):
            value = merge(below, value)  # but of a budget's units only one
        result[key] = value
    return result


def _breadth(override: str) -> tuple[int, bool]:
    """Sections go before what is in them, and the name of a part before its settings."""
    key = override.partition("=")[0]
    return key.count("."), not key.endswith(".name")


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted `KEY=VALUE`, the value read as YAML. Naming another part starts that slot afresh."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r} is not of the form KEY=VALUE")
    try:
        value = parse_value(text)
    except ValueError:
        raise RecipeError(f"override {override!r}: the value is not YAML") from None
    *folders, leaf = key.split(".")
    node = data
    for folder in folders:
        node[folder] = _section(node.get(folder))
        node = node[folder]
    if leaf == "name" and folders and node.get("name") != value:
        node.clear()
    node[leaf] = value
    if folders and folders[-1] == "budget":  # one unit at a time
        for other in node.keys() - {leaf}:
            del node[other]
    if key == "update.lr" and isinstance(node.get("around"), dict):  # short for the other: the last one counts
        node["around"] = {name: kept for name, kept in node["around"].items() if name != "lr"}
    elif key == "update.around.lr":
        data["update"].pop("lr", None)


def parse_value(text: str) -> Any:
    """A value as recipes write it. Raises ValueError if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not YAML") from error


def _section(value: object) -> dict[str, Any]:
    """A section to write into: a copy of the one there is, or the named part's, or an empty one."""
    if isinstance(value, str):
        return {"name": value}
    return dict(value) if isinstance(value, Mapping) else {}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for two things: `1e-3` is a number, as in YAML 1.2, and a key may not be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key, _ in node.value if keys.count(key.value) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[1].value!r} is there twice", twice[1].start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = copy.deepcopy(_side.yaml_implicit_resolvers)
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def write_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as a recipe's file, which reads back as it was."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
