"""The command line. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done, 1 a run diverged or failed, 2 bad input, 128 + n stopped by signal n.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import heterodox
from heterodox.cli.shared import (
    WRITTEN,
    AsJson,
    CheckpointOption,
    DataKeys,
    Overrides,
    RecipeArgument,
    RunArgument,
    show,
)
from heterodox.cli.studies import compare, report, sweep
from heterodox.core.files import as_path

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train transformers by learning rules other than backpropagation, and compare them fairly with it.",
)


def _print_version(wanted: bool | None) -> None:
    if wanted:
        print(f"heterodox {heterodox.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    """Read what every call takes."""


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default: `runs/NAME-seedN`.", **WRITTEN)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in the folder.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="With --resume: go on from this one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one recipe."""
    from heterodox.app.recipe import load_recipe
    from heterodox.app.session import default_folder
    from heterodox.app.train import train as train_recipe
    from heterodox.cli.console import ProgressConsole, TrainingProgress, training_summary

    resolved = load_recipe(recipe, overrides or ())
    folder = out or default_folder(resolved)
    budget = resolved.run.budget
    console = ProgressConsole(quiet=quiet or os.environ.get("RANK", "0") != "0")
    with TrainingProgress(resolved.name, budget.unit, budget.limit, console) as progress:
        run = train_recipe(resolved, folder, resume=resume, checkpoint=checkpoint, observers=[progress])
    if os.environ.get("RANK", "0") == "0":
        show(run.summary, training_summary(run.summary, run.folder), as_json, quiet)
    if run.signal is not None and run.summary["status"] == "interrupted":
        raise typer.Exit(128 + run.signal)
    if run.summary["status"] == "diverged":
        print(run.summary["message"], file=sys.stderr)
        raise typer.Exit(1)


app.command()(compare)
app.command()(sweep)


@app.command()
def generate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or a file in sparse format.", parser=as_path)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 300,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Keep the likeliest tokens of this mass.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    checkpoint: CheckpointOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Let a trained model write."""
    from heterodox.app.use import generate_run

    say = (lambda text: None) if as_json else (lambda text: print(text, end="", flush=True))
    text = generate_run(
        run, prompt, tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, checkpoint=checkpoint, device=device,
        on_text=say,
    )  # fmt: skip
    say("\n")
    if as_json:
        print(json.dumps({"prompt": prompt, "text": text}))


@app.command()
def probe(
    run: RunArgument,
    batches: Annotated[int, typer.Option(min=1, help="Training batches to average over.")] = 1,
    checkpoint: CheckpointOption = None,
    as_json: AsJson = False,
) -> None:
    """Compare a run's rule with the exact gradient, parameter by parameter."""
    from heterodox.app.use import probe_run
    from heterodox.cli.console import alignment_table

    report = probe_run(run, checkpoint, batches)
    show(report, alignment_table(report), as_json)


@app.command()
def export(
    run: RunArgument,
    form: Annotated[str, typer.Option("--format", help="safetensors, gpt2 (transformers), sparse.")] = "safetensors",
    out: Annotated[Path | None, typer.Option(help="Default: in the run, by the format's name.", **WRITTEN)] = None,
    checkpoint: CheckpointOption = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model in another program's format."""
    from heterodox.app.export import describe_sparse, export_run
    from heterodox.cli.console import sparse_size

    default = run / {"safetensors": "export.safetensors", "sparse": "sparse.safetensors"}.get(form, form)
    written = export_run(run, form, out or default, checkpoint)
    about = describe_sparse(written) if form == "sparse" else {}
    said = f"wrote {written}" + (f": {sparse_size(about)}" if about else "")
    show({"format": form, "path": str(written)} | about, said, as_json)


@app.command()
def score(
    run: RunArgument,
    overrides: DataKeys = None,
    data: Annotated[
        Path | None, typer.Option(parser=as_path, help="Score this text instead: short for `data.path=PATH`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The scores.", **WRITTEN)] = Path("scores.parquet"),
    split: Annotated[str, typer.Option(help="train, meta, val or test.")] = "train",
    keep: Annotated[float | None, typer.Option(help="With --index: the share to keep, the best.")] = None,
    index: Annotated[Path | None, typer.Option(help="Also write the ids of the best here.", **WRITTEN)] = None,
    noisy: Annotated[bool, typer.Option("--noisy", help="Plant the recipe's noise in a held-out split first.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Score examples by a run's rater, or by its model's likelihood if it has none."""
    from heterodox.app.use import score_run
    from heterodox.cli.console import scoring_summary

    changes = [*(overrides or ()), *([f"data.path={data}"] if data else [])]
    answer = score_run(run, out, overrides=changes, split=split, keep=keep, index=index, noisy=noisy, device=device)
    show(answer, scoring_summary(answer), as_json)


app.command()(report)


@app.command("list")
def list_parts(as_json: AsJson = False) -> None:
    """List every part of every slot."""
    from heterodox.app.describe import list_catalog
    from heterodox.cli.console import catalog_table

    parts = list_catalog()
    show(parts, catalog_table(parts), as_json)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A part's name, as `heterodox list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Explain a part: its idea, its options, and where each parameter's signal comes from."""
    from heterodox.app.describe import explain_part
    from heterodox.cli.console import explanation

    described = explain_part(name)
    show(described, explanation(described), as_json)


@app.command()
def check(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a rule for what every rule must do, on a tiny recipe with `KEY=VALUE` over it, e.g. `credit=NAME`."""
    from heterodox.app.recipe import load_recipe
    from heterodox.cli.console import checks_table
    from heterodox.conformance import run_checks, tiny_recipe

    recipe = load_recipe(tiny_recipe(update={"name": "adamw", "lr": 1e-2}), overrides or ())
    outcomes = run_checks(recipe, lambda outcome: print(outcome.trace or outcome.check, file=sys.stderr))
    shown = [asdict(outcome) for outcome in outcomes]
    show(shown, checks_table(shown), as_json)
    if any(outcome.problem for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    speed: Annotated[float | None, typer.Option(min=1, help="FLOPs per second, to tell hours.")] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, memory, FLOPs and tokens of a recipe, with --speed hours. Trains nothing."""
    from heterodox.app.plan import plan as plan_recipe
    from heterodox.app.recipe import load_recipe
    from heterodox.cli.console import plan_table

    answer = plan_recipe(load_recipe(recipe, overrides or ()), speed)
    show(answer, plan_table(answer), as_json)
