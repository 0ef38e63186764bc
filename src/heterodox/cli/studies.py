"""The commands about several runs: comparing them, searching settings, reporting."""

from pathlib import Path
from typing import Annotated

import typer

from heterodox.cli.shared import WRITTEN, AsJson, RecipesAndOverrides, no_options, show
from heterodox.core.errors import RecipeError
from heterodox.core.files import as_path


def compare(
    arguments: RecipesAndOverrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each recipe.")] = 1,
    out: Annotated[Path, typer.Option(help="The study's folder.", **WRITTEN)] = Path("runs/compare"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side; default: one per core or GPU.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train several recipes at the same seeds and report how they compare."""
    from heterodox.api import expand, quick_recipes
    from heterodox.app.recipe import load_recipe
    from heterodox.cli.console import StudyProgress, comparison_summary
    from heterodox.study.study import Study

    given, overrides = _divided(arguments or [])
    sources = expand(given or [quick_recipes()])
    study = Study([load_recipe(source, overrides) for source in sources], out, num_seeds=seeds, jobs=jobs)
    with StudyProgress() as progress:
        results = study.run(progress.update)
    show(results, comparison_summary(results, out), as_json)
    if results["interrupted"]:
        raise typer.Exit(128 + results["interrupted"])
    if any(row["status"] != "finished" for row in results["runs"]):
        raise typer.Exit(1)


def sweep(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipe files or folders.", callback=no_options),
    ],
    search: Annotated[list[str], typer.Option(metavar="KEY=V,V,...", help="A setting and its values; repeatable.")],
    trials: Annotated[int | None, typer.Option(min=1, help="As many combinations at random; default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each trial.")] = 1,
    out: Annotated[Path, typer.Option(help="The sweep's folder.", **WRITTEN)] = Path("runs/sweep"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side; default: one per core or GPU.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search the same values for every recipe, by validation loss; the best become recipe files."""
    from heterodox.api import expand
    from heterodox.cli.console import StudyProgress, sweep_summary
    from heterodox.study.sweep import Sweep, parse_search

    sources, overrides = _divided(arguments)
    if not sources:
        raise RecipeError("nothing to sweep: give at least one recipe")
    study = Sweep(
        expand(sources), parse_search(search), out, overrides=overrides, trials=trials, num_seeds=seeds, jobs=jobs
    )
    with StudyProgress() as progress:
        found = study.run(progress.update)
    show(found, sweep_summary(found, out), as_json)
    if found["interrupted"]:
        raise typer.Exit(128 + found["interrupted"])
    if any(rule["best"] is None for rule in found["rules"]):
        raise typer.Exit(1)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Study or run folders.", parser=as_path)],
    out: Annotated[
        Path | None, typer.Option(help="Default: report.html in the first folder; .md: tables.", **WRITTEN)
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Instead: every chart as a file in this folder.", **WRITTEN)
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="With --figures: svg (default), png, svg,png.")] = None,
    rules: Annotated[str | None, typer.Option(help="Only these recipes: NAME,NAME...")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the HTML report (or the Markdown tables, or the figures) of one or more studies or runs."""
    from heterodox.report import write_figures, write_markdown, write_report

    if figures is None and form is not None:
        raise RecipeError(f"--format {form} is of charts as files: name their folder with --figures")
    if figures is not None and out is not None:
        raise RecipeError("--figures writes charts instead of --out: call report twice for both")
    only = [name.strip() for name in (rules or "").split(",") if name.strip()]
    if rules is not None and not only:
        raise RecipeError("--rules names no recipe: --rules NAME,NAME")
    if only and out is None and figures is None:
        raise RecipeError(
            "--rules leaves recipes out, so name the page with --out, or a folder of charts with --figures"
        )
    if figures is not None:
        files = write_figures(folders, figures, [name.strip() for name in (form or "svg").split(",")], only)
        answer = {"path": str(figures), "files": [file.name for file in files]}
    else:
        out = out or folders[0] / "report.html"
        written = (write_markdown if out.suffix == ".md" else write_report)(folders, out, only)
        answer = {"path": str(written)}
    show(answer, f"wrote {answer['path']}", as_json)


def _divided(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Recipes, and overrides of them."""
    from heterodox.api import is_override

    overrides = [argument for argument in arguments if is_override(argument)]
    return [argument for argument in arguments if argument not in overrides], overrides
