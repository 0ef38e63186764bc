"""An equal search for the settings of several rules: the same values for each, judged by validation loss.

A sweep is a study whose recipes are trials, so finished trials are kept, stopped ones go on, and a trial that fails
does not take the others down. A rule's best trial becomes a recipe file that says how it was found.
"""

import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heterodox.comparison.statistics import is_finite, table
from heterodox.comparison.study import Study, Watch
from heterodox.core.errors import RecipeError
from heterodox.recipe import Recipe, Source, apply_override, check, load_recipe, parse_value, raw_recipe
from heterodox.run.folder import write_atomically

Settings = dict[str, Any]
"""Values by dotted key."""
NOT_SETTINGS = ("name", "seed", "description", "tuning")


@dataclass(frozen=True)
class Trial:
    """One rule with one choice of settings."""

    rule: str
    settings: Settings
    recipe: Recipe


class Sweep:
    """Every recipe at every combination of `search`, or at `trials` of them, drawn once for all recipes.

    `search` has the values to try by dotted key. `overrides` hold for all trials and are no part of what is found.
    Raises `RecipeError` for keys and values that a recipe does not take.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        search: Mapping[str, Sequence[Any]],
        out: Path,
        *,
        overrides: Sequence[str] = (),
        trials: int | None = None,
        num_seeds: int = 1,
        jobs: int | None = None,
    ) -> None:
        self.search = {key: list(values) for key, values in search.items()}
        self.overrides = list(overrides)
        _check_search(self.search, self.overrides)
        self.sources = {load_recipe(source, self.overrides).name: source for source in sources}
        if len(self.sources) < len(sources):
            raise RecipeError("two recipes have the same name; give each a `name` of its own")
        self.trials = [
            Trial(rule, settings, _trial(rule, source, settings, self.overrides))
            for settings in combinations(self.search, trials)
            for rule, source in self.sources.items()
        ]
        self.study = Study([trial.recipe for trial in self.trials], out, num_seeds=num_seeds, jobs=jobs)
        self.out = out

    def run(self, watch: Watch | None = None) -> dict[str, Any]:
        """Train what is not finished yet; writes `sweep.json` and, of each rule's best, `best/RULE.yaml`.

        Returns what `sweep.json` holds: `rules`, each with its `trials` (settings, `val_loss` as an interval in nats
        per token, FLOPs, how many seeds `failed`), the settings of the `best`, its `file`, and the keys whose best
        value lies `at_the_end` of the values tried. A trial with a seed that failed cannot be the best. After SIGINT
        or SIGTERM `interrupted` is the signal's number, and no best is named.
        """
        results = self.study.run(watch)
        rows = {row["recipe"]: row for row in table(results["runs"], self.study.baseline)}
        rules = [self._rule(rule, rows, whole=not results["interrupted"]) for rule in self.sources]
        kept = ("seeds", "corpus", "versions", "device", "created", "command", "interrupted", "elapsed_seconds")
        found = {"format": 1, "search": self.search, "overrides": self.overrides, "rules": rules}
        found |= {key: results[key] for key in kept}
        write_atomically(self.out / "sweep.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        return found

    def _rule(self, rule: str, rows: Mapping[str, Mapping[str, Any]], *, whole: bool) -> dict[str, Any]:
        trials = [_row(trial, rows[trial.recipe.name]) for trial in self.trials if trial.rule == rule]
        able = [row for row in trials if row["val_loss"] and not row["failed"]]
        best = min(able, key=lambda row: row["val_loss"]["mean"]) if able and whole else None
        told: dict[str, Any] = {"recipe": rule, "trials": trials, "best": None, "at_the_end": [], "file": None}
        if best is None:
            return told
        file = self.out / "best" / f"{rule}.yaml"
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, self._recipe(rule, trials, best["settings"]))
        ends = [key for key, value in best["settings"].items() if _at_the_end(value, self.search[key])]
        return told | {"best": best["settings"], "at_the_end": ends, "file": str(file.relative_to(self.out))}

    def _recipe(self, rule: str, trials: Sequence[Mapping[str, Any]], best: Settings) -> str:
        """The rule's recipe as it was given, with the best settings and how they were found."""
        data = raw_recipe(self.sources[rule])
        for key, value in best.items():
            apply_override(data, f"{key}={json.dumps(value)}")
        seeds = self.study.seeds
        where = [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", *_told_overrides(self.overrides)]
        losses = [f"{told(row['settings'])}: {_loss(row)}" for row in trials]
        data["name"] = rule
        data["tuning"] = {
            "trials": len(trials),
            "seeds": len(seeds),
            "searched": self.search,
            "note": f"val loss ({', '.join(where)}) at {'; '.join(losses)}",
        }
        check(data)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def parse_search(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=VALUE,VALUE,...` arguments as values by key. Raises `RecipeError` for what is not of that form."""
    search: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key or not text.strip():
            raise RecipeError(f"--search {argument!r} is not of the form KEY=VALUE,VALUE")
        if key in search:
            raise RecipeError(f"--search {key} is there twice; give all its values at once")
        try:
            search[key] = parse_value(f"[{text}]")
        except ValueError:
            raise RecipeError(f"--search {argument!r}: the values are not YAML") from None
    return search


def combinations(search: Mapping[str, Sequence[Any]], trials: int | None) -> list[Settings]:
    """All combinations of the values, or `trials` of them at random, the same at every call, in the grid's order."""
    grid = [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]
    if trials is None or trials >= len(grid):
        return grid
    return [grid[index] for index in sorted(random.Random(0).sample(range(len(grid)), trials))]


def told(settings: Settings) -> str:
    """Settings as a person writes them."""
    return ", ".join(f"{key}={_word(value)}" for key, value in settings.items())


def _check_search(search: Mapping[str, Sequence[Any]], overrides: Sequence[str]) -> None:
    if not search:
        raise RecipeError("nothing to search: give --search KEY=VALUE,VALUE, e.g. --search update.lr=1e-3,3e-3,1e-2")
    given = {override.partition("=")[0] for override in overrides}
    for key, values in search.items():
        if key in NOT_SETTINGS:
            raise RecipeError(f"{key} is no setting of a rule, so there is nothing to search")
        if key in given:
            raise RecipeError(f"{key} is searched and overridden; drop one")
        if not values:
            raise RecipeError(f"{key}: no values to try")
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise RecipeError(f"{key}: {_word(twice[0])} is there twice")


def _trial(rule: str, source: Source, settings: Settings, overrides: Sequence[str]) -> Recipe:
    chosen = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    recipe = load_recipe(source, [*overrides, *chosen])
    label = "-".join(f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in settings.items())
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{rule}-{label}")
    return recipe.model_copy(update={"name": name, "description": f"{rule} with {told(settings)}", "tuning": None})


def _row(trial: Trial, row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("val_loss", "flops", "seeds", "failed")}
    return {"recipe": trial.recipe.name, "settings": trial.settings} | kept


def _at_the_end(value: Any, values: Sequence[Any]) -> bool:
    numbers = [v for v in values if is_finite(v) and not isinstance(v, bool)]
    return len(numbers) == len(values) > 1 and value in (min(numbers), max(numbers))


def _loss(row: Mapping[str, Any]) -> str:
    failed = f" ({row['failed']} failed)" * bool(row["failed"])
    return (f"{row['val_loss']['mean']:.3f}" if row["val_loss"] else "none") + failed


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _told_overrides(overrides: Sequence[str]) -> list[str]:
    """What was overridden, without what is of this machine."""
    pairs = [override.partition("=")[::2] for override in overrides]
    kept = [(key, value) for key, value in pairs if key not in ("run.threads", "run.device")]
    return [f"{key}={Path(value).name if key.endswith('path') else value}" for key, value in kept]
