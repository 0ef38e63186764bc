"""What commands have in common: arguments, how they answer, and how they refuse."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from heterodox.core.errors import RecipeError
from heterodox.core.files import as_path

UsageError: type[Any] = typer.BadParameter.__bases__[0]
"""What Typer raises for arguments that a command does not take."""


def no_options(context: Any, arguments: list[str] | None) -> list[str] | None:
    """Refuses `seeds=3` where `--seeds 3` is meant, with that hint."""
    for argument in arguments or ():
        key, _, value = argument.partition("=")
        option = next((param for param in context.command.params if f"--{key}" in param.opts), None)
        if option is not None:
            from heterodox.api import is_override
            from heterodox.app.recipe import Recipe

            if is_override(argument) and key not in Recipe.model_fields:
                meant = f"--{key}" if getattr(option, "is_flag", False) else f"--{key} {value}"
                raise RecipeError(f"unknown key {key!r}; it is an option of {context.info_name}: {meant}")
    return arguments


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides, e.g. `update.lr=3e-4`.", callback=no_options),
]
DataKeys = Annotated[
    list[str] | None,
    typer.Argument(metavar="data.KEY=VALUE", help="Overrides of the run's data section.", callback=no_options),
]
RecipesAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE|KEY=VALUE", help="Recipe files or folders; default: the quick ones.", callback=no_options
    ),
]
WRITTEN: dict[str, Any] = {"parser": as_path, "metavar": "PATH"}
"""Of options that name what is written: an empty name is refused."""
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", parser=as_path)]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe such as `quick/backprop`.")
]
CheckpointOption = Annotated[str | None, typer.Option(help="Which checkpoint; default: the latest.")]


def show(data: Any, shown: Any, as_json: bool, quiet: bool = False) -> None:
    """The answer on standard output: as JSON, or as a person reads it."""
    if as_json:
        print(json.dumps(data, indent=1))
    elif not quiet:
        Console(width=None if sys.stdout.isatty() else 160).print(shown, highlight=False)


def usage_line(error: Any) -> str:
    """A `UsageError` as we say it: what was found and what was expected, or Typer's words and where there is help."""
    command = getattr(error, "ctx", None)
    cause, param = error.__cause__, getattr(error, "param", None)
    if isinstance(cause, ValidationError) and param is not None:
        problem = cause.errors(include_url=False)[0]
        expected = problem["msg"].removeprefix("Input should be ").partition(",")[0]
        return f"{param.opts[0]}: found {problem['input']!r}, expected {expected}"
    said = error.format_message().strip().removesuffix(".")
    words = ["heterodox", *([command.info_name] if command and command.parent else []), "--help"]
    return f"{said[:1].lower()}{said[1:]}; see {' '.join(words)}"
