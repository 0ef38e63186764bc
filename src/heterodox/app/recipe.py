"""Recipes: a YAML file plus dotted overrides, checked as a whole before anything runs."""

import copy
import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from heterodox.app import catalog
from heterodox.core.errors import RecipeError, nearest
from heterodox.core.files import as_path, there
from heterodox.core.slot import Config, Slot, part_config
from heterodox.core.state import plain
from heterodox.data import DataConfig
from heterodox.training.config import LogConfig, RunConfig

# Turning what pydantic says of a recipe into one line for its author.


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


LARGEST = 1 << 20
"""Bytes of the largest recipe."""
MOST_VALUES = 100_000
"""Values in the largest recipe, once its aliases are written out."""
DEEPEST = 50
"""Levels of keys and lists in the deepest recipe."""
LONGEST_CHAIN = 50
"""Recipes in the longest chain of bases."""

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

    def in_float32(self) -> list[str]:
        """Return what is computed in float32 although the run's precision is bfloat16."""
        if self.run.precision != "bfloat16":
            return []
        return [what for slot in SLOTS for what in getattr(self, slot).in_float32()]

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
        path = locate(source)
        data = read(path)
        data.setdefault("name", name_of(path))
    given = list(overrides)
    _refuse_contradictions(given)
    for override in sorted(given, key=_breadth):
        apply_override(data, override)
    return data


def locate(source: str | Path) -> Path:
    """Return the file of a recipe: `source` itself, or the shipped recipe of that name, such as `quick/backprop`."""
    path = as_path(source)
    if there(path):
        return path
    for name in (f"{source}.yaml", str(source)):
        shipped = recipes_folder() / name
        if there(shipped) and shipped.resolve().is_relative_to(recipes_folder().resolve()):
            return shipped
    return path


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def _nearest_recipe(path: Path) -> str:
    """Name the shipped recipe that is meant by a name without a file, if there is one like it."""
    folder = recipes_folder()
    shipped = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("[!_]*.yaml")]
    close = difflib.get_close_matches(str(path).removesuffix(".yaml"), shipped, n=1, cutoff=0.6)
    return f"; did you mean the shipped recipe {close[0]!r}?" if close else ""


def name_of(path: Path) -> str:
    """Return a legal name for the run of a recipe file that has none: the file's, without what names cannot hold."""
    plain = unicodedata.normalize("NFKD", path.stem.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._") or "recipe"


def _refuse_contradictions(overrides: Sequence[str]) -> None:
    """Raise RecipeError where one override on the same line would silently undo another."""
    values = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    corpus = next((key for key in ("data.corpus", "data.corpus.name") if values.get(key, "file") != "file"), None)
    if corpus and "data.path" in values:
        raise RecipeError(f"data.path reads a file, and {corpus}={values[corpus]} is another corpus; drop one")
    if "data.path" in values and "data.corpus.path" in values:
        raise RecipeError("data.path and data.corpus.path both say which file to read; drop one")
    budget = [key for key in values if key.startswith("run.budget.")]
    if len(budget) > 1:
        raise RecipeError(f"a run has one budget, and here are {' and '.join(budget)}; drop one")
    for key, value in values.items():
        inner = values.get(f"{key}.name")
        if inner is not None and inner != value:
            raise RecipeError(f"{key}={value} and {key}.name={inner} name two parts; drop one")


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
    if len(above) > LONGEST_CHAIN:
        raise RecipeError(f"recipe {above[0]} has a chain of more than {LONGEST_CHAIN} bases")
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"recipe {path} is not a file")
        if path.exists() and path.stat().st_size > LARGEST:
            raise RecipeError(f"recipe {path} has {path.stat().st_size} bytes, more than any recipe ({LARGEST})")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist{_nearest_recipe(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(f"recipe {str(path)[:200]} cannot be read: {reason}") from None
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"recipe {path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"recipe {path} holds {found}, expected a mapping of sections")
    for key in data:
        if not isinstance(key, str):
            raise RecipeError(f"recipe {path}: unknown key {str(key)[:80]!r}, expected a word")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str) or not there(path.parent / base):
        raise RecipeError(f"recipe {path} names the base {str(base)[:200]!r}, and there is no such file beside it")
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
        if key == "corpus" and "path" in result and "path" not in top and _names_another(value):
            del result["path"]  # `data.path` of the base is short for a corpus, and the top names another
        both = isinstance(below, dict) and isinstance(value, dict)
        if both and key != "budget" and value.get("name", below.get("name")) == below.get("name"):
            value = merge(below, value)  # but of a budget's units only one
        result[key] = value
    return result


def _names_another(corpus: Any) -> bool:
    """Whether a `corpus` section says itself what to read."""
    return isinstance(corpus, str) or (isinstance(corpus, Mapping) and bool({"name", "path"} & corpus.keys()))


def _breadth(override: str) -> tuple[int, bool]:
    """Sections go before what is in them, and the name of a part before its settings."""
    key = override.partition("=")[0]
    return key.count("."), not key.endswith(".name")


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted `KEY=VALUE`, the value read as YAML. Naming another part starts that slot afresh."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override[:80]!r} is not of the form KEY=VALUE")
    if key.count(".") > DEEPEST:
        raise RecipeError(f"override {key[:80]!r}…: no key is that deep")
    try:
        value = parse_value(text, key)
    except ValueError as error:
        hint = "; text that is not YAML goes in quotes: KEY='\"...\"'"
        raise RecipeError(f"override {override[:80]!r}: the value is not YAML ({error}){hint}") from None
    *folders, leaf = key.split(".")
    node = data
    for folder in folders:
        node[folder] = _section(node.get(folder))
        node = node[folder]
    if leaf == "name" and folders and node.get("name") != value:
        node.clear()
    node[leaf] = value
    if key in ("data.corpus", "data.corpus.name", "data.corpus.path"):  # it says what to read, not the recipe's path
        read_before = data["data"].pop("path", None)
        if key == "data.corpus.path" and read_before is not None:
            data["data"]["corpus"] = {**data["data"]["corpus"], "name": "file"}
    if folders and folders[-1] == "budget":  # one unit at a time
        for other in node.keys() - {leaf}:
            del node[other]
    if key == "update.lr" and isinstance(node.get("around"), dict):  # short for the other: the last one counts
        node["around"] = {name: kept for name, kept in node["around"].items() if name != "lr"}
    elif key == "update.around.lr":
        data["update"].pop("lr", None)


def parse_value(text: str, key: str = "") -> Any:
    """Return a value as recipes write it. Text is taken as it stands where `key` wants text, such as a path.

    Raises ValueError if it is not YAML.
    """
    if key and wants_text(key):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        if not quoted and text not in ("null", "~", ""):
            return text
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """Return what a piece of YAML holds. Raises ValueError that says where it is wrong, without repeating the text."""
    try:
        data = yaml.load(text, _Loader)
        _measure(data)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or 'it cannot be parsed'}{where}") from None
    except yaml.YAMLError:
        raise ValueError("it holds characters that YAML does not take") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return data


def _measure(data: Any) -> None:
    """Raise ValueError for data that refers to itself, or that is too large once its aliases are written out."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: Any, depth: int) -> int:
        if not isinstance(node, dict | list):
            return 1
        if id(node) in open_:
            raise ValueError("it refers to itself")
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        if id(node) not in sizes:
            open_.add(id(node))
            inner = node.values() if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in inner)
            open_.discard(id(node))
        if sizes[id(node)] > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES} values")
        return sizes[id(node)]

    size(data, 0)


def wants_text(key: str) -> bool:
    """Return whether a dotted key takes text in every part that has it: a path, a name, a prompt."""
    sections: list[type[BaseModel]] = [Recipe]
    *folders, leaf = key.split(".")
    for folder in folders:
        fields = [section.model_fields[folder] for section in sections if folder in section.model_fields]
        sections = [inner for field in fields for inner in sections_of(field.annotation)]
    kinds = [section.model_fields[leaf].annotation for section in sections if leaf in section.model_fields]
    return bool(kinds) and (leaf != "name" or not folders) and all(_is_text(kind) for kind in kinds)


def _is_text(annotation: Any) -> bool:
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all(kind in (str, Path, type(None)) for kind in kinds) and set(kinds) != {type(None)}


def _section(value: object) -> dict[str, Any]:
    """A section to write into: a copy of the one there is, or the named part's, or an empty one."""
    if isinstance(value, str):
        return {"name": value}
    return dict(value) if isinstance(value, Mapping) else {}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for two things: `1e-3` is a number, as in YAML 1.2, and a key may not be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        count = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and count[key.value] > 1]
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
