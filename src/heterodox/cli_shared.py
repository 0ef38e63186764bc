"""What commands have in common: arguments, and how they answer."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides, e.g. `update.lr=3e-4`."),
]
RecipesAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipe files or folders; default: the quick ones."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
CheckpointOption = Annotated[str | None, typer.Option(help="Which checkpoint; default: the latest.")]


def show(data: Any, shown: Any, as_json: bool, quiet: bool = False) -> None:
    """The answer on standard output: as JSON, or as a person reads it."""
    if as_json:
        print(json.dumps(data, indent=1))
    elif not quiet:
        Console(width=None if sys.stdout.isatty() else 160).print(shown, highlight=False)
