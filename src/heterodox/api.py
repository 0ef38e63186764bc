"""The Python face: what the command line does, as functions."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heterodox.app.recipe import Recipe, Source, load_recipe, locate, recipes_folder
from heterodox.app.session import default_folder
from heterodox.app.train import Run
from heterodox.app.train import train as train_recipe
from heterodox.core.errors import RecipeError
from heterodox.core.files import PathLike, as_path, there
from heterodox.study.study import Study, Watch
from heterodox.study.sweep import Sweep
from heterodox.training.recorder import Observer


def train(
    recipe: Source,
    *,
    out: PathLike | None = None,
    overrides: Iterable[str] = (),
    resume: bool = False,
    checkpoint: str | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Train one recipe in the folder `out` (default: `runs/<name>-seed<seed>`); returns its folder, summary, model.

    `overrides` are dotted `KEY=VALUE` strings. `resume` goes on from `checkpoint` (default: the latest) in `out`.
    `observers` are told of every metrics row. Raises `RecipeError`, `CorpusError` or `CheckpointError`.
    """
    resolved = load_recipe(recipe, overrides)
    folder = as_path(out) if out is not None else default_folder(resolved)
    return train_recipe(resolved, folder, resume=resume, checkpoint=checkpoint, observers=observers)


def compare(
    recipes: Source | Sequence[Source] | None = None,
    *,
    seeds: int = 1,
    out: PathLike = "runs/compare",
    overrides: Iterable[str] = (),
    jobs: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train each recipe at each seed, write `results.json` and `report.html` in `out`; returns the results.

    Without recipes it runs those of `recipes/quick/`. Finished runs found in `out` are kept, stopped ones go on.
    """
    overrides = list(overrides)
    chosen = expand([quick_recipes()] if recipes is None else recipes)
    return Study([load_recipe(r, overrides) for r in chosen], out, num_seeds=seeds, jobs=jobs).run(watch)


def sweep(
    recipes: Source | Sequence[Source],
    search: Mapping[str, Any],
    *,
    trials: int | None = None,
    seeds: int = 1,
    out: PathLike = "runs/sweep",
    overrides: Iterable[str] = (),
    jobs: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train each recipe at each combination of the values in `search`, or at `trials` of them, the same for all.

    `search` has values by dotted key, such as `{"update.lr": [1e-3, 3e-3]}`. Writes `sweep.json`, a recipe file
    `best/RULE.yaml` for the trial of lowest validation loss (nats per token), and a report, in `out`; returns what
    `sweep.json` holds. Raises `RecipeError` for keys or values that a recipe does not take.
    """
    return Sweep(
        expand(recipes), search, out, overrides=list(overrides), trials=trials, num_seeds=seeds, jobs=jobs
    ).run(watch)


def expand(sources: Source | Sequence[Source]) -> list[Source]:
    """Folders among `sources` become the recipes in them, sorted; files whose names begin with `_` are bases."""
    expanded: list[Source] = []
    for source in [sources] if isinstance(sources, (str, Path, Mapping, Recipe)) else sources:
        if isinstance(source, (str, Path)) and (folder := locate(source)).is_dir():
            found = sorted(p for p in folder.glob("*.yaml") if not p.name.startswith("_"))
            if not found:
                raise RecipeError(f"folder {source} holds no recipe (*.yaml)")
            expanded += found
        else:
            expanded.append(source)
    return expanded


def is_override(argument: str) -> bool:
    """Whether this is `KEY=VALUE`, and not a file that has such a name."""
    return "=" in argument and not there(Path(argument))


def quick_recipes() -> Path:
    """The folder of the recipes that `compare` runs when it is given none."""
    return recipes_folder() / "quick"
