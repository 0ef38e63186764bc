"""An equal search for the settings of several rules: the same values for each, judged by validation loss.

A sweep is a study whose recipes are trials, so finished trials are kept, stopped ones go on, and a trial that fails
does not take the others down. A rule's best trial becomes a recipe file that says how it was found.
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterodox.app.recipe import Recipe, Source, check, overridden, parse_value, write_yaml
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path, exists, read_json, write_atomically, write_json, writing
from heterodox.core.shapes import SWEEP
from heterodox.core.state import plain
from heterodox.report.statistics import is_finite, table
from heterodox.study.study import Study, Watch

# What a sweep tries: values by dotted key, their combinations, and names for them.


Settings = dict[str, Any]
"""Values by dotted key."""
NOT_SETTINGS = ("name", "seed", "description", "tuning", "log")
LONGEST = 100
"""Characters of a trial's name, which names a folder."""


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


def check_search(search: Mapping[str, Any], overrides: Sequence[str], trials: int | None) -> dict[str, list[Any]]:
    """The values as plain data. Raises `RecipeError` where there is nothing to search by them."""
    if not search:
        raise RecipeError("nothing to search: give --search KEY=VALUE,VALUE, e.g. --search update.lr=1e-3,3e-3,1e-2")
    if trials is not None and trials < 1:
        raise RecipeError(f"a sweep needs at least one trial, found {trials}")
    given = {override.partition("=")[0] for override in overrides}
    if "name" in given:
        raise RecipeError("a sweep gives its trials names of its own; drop name=")
    found = {key: _values(key, values) for key, values in search.items()}
    for key, values in found.items():
        if key.partition(".")[0] in NOT_SETTINGS:
            raise RecipeError(f"{key} is no setting of a rule, so there is nothing to search")
        if key in given:
            raise RecipeError(f"{key} is searched and overridden; drop one")
        if not values:
            raise RecipeError(f"{key}: no values to try")
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            raise RecipeError(f"{key}: {word(twice[0])} is there twice")
    return found


def combinations(search: Mapping[str, Sequence[Any]], trials: int | None) -> list[Settings]:
    """All combinations of the values, or `trials` of them at random, in the grid's order.

    The draw is the same at every call, and a longer one has a shorter one in it.
    """
    sizes = [len(values) for values in search.values()]
    number = math.prod(sizes)
    if trials is None or trials >= number:
        return [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]
    generator, drawn = random.Random(0), set[int]()
    while len(drawn) < trials:
        drawn.add(generator.randrange(number))
    return [_at(search, sizes, index) for index in sorted(drawn)]


def tried(search: Mapping[str, Sequence[Any]], chosen: Sequence[Settings]) -> dict[str, list[Any]]:
    """The values that occur in what was chosen."""
    return {key: [value for value in values if any(s[key] == value for s in chosen)] for key, values in search.items()}


def told(settings: Settings) -> str:
    """Settings as a person writes them."""
    return ", ".join(f"{key}={word(value)}" for key, value in settings.items())


def word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def trial_name(rule: str, settings: Settings) -> str:
    """A name that says the settings, as far as a name can, and is no other trial's."""
    label = "-".join([rule, *(f"{key.rpartition('.')[2]}-{word(value)}" for key, value in settings.items())])
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", label)
    if name == label and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _values(key: str, values: object) -> list[Any]:
    try:
        found = plain(values)
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from None
    if not isinstance(found, list):
        raise RecipeError(f"{key}: found {found!r}, expected a list of values to try")
    return found


def _at(search: Mapping[str, Sequence[Any]], sizes: Sequence[int], index: int) -> Settings:
    """The combination at this place of the grid, the last key changing fastest."""
    places = []
    for size in reversed(sizes):
        index, place = divmod(index, size)
        places.append(place)
    return {key: values[place] for (key, values), place in zip(search.items(), reversed(places), strict=True)}


@dataclass(frozen=True)
class Trial:
    """One rule with one choice of settings: `found` is its recipe as given with those, `recipe` the overrides, too."""

    rule: str
    settings: Settings
    found: dict[str, Any]
    recipe: Recipe


class Sweep:
    """Every recipe at every combination of `search`, or at `trials` of them, drawn once for all recipes.

    `search` has the values to try by dotted key. `overrides` hold for all trials and are no part of what is found.
    Raises `RecipeError` for keys and values that a recipe does not take, and for trials that come to the same.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        search: Mapping[str, Any],
        out: PathLike,
        *,
        overrides: Sequence[str] = (),
        trials: int | None = None,
        num_seeds: int = 1,
        jobs: int | None = None,
    ) -> None:
        out = as_path(out)
        self.overrides = list(overrides)
        checked = check_search(search, self.overrides, trials)
        chosen = combinations(checked, trials)
        self.search = tried(checked, chosen)
        self.trials = [_trial(source, settings, self.overrides) for settings in chosen for source in sources]
        self.rules = [trial.rule for trial in self.trials[: len(sources)]]
        twice = [rule for rule in self.rules if self.rules.count(rule) > 1]
        if twice:
            raise RecipeError(f"two recipes are called {twice[0]!r}; give each a `name` of its own")
        for rule in self.rules:
            _require_different([trial for trial in self.trials if trial.rule == rule])
        self.study = Study([trial.recipe for trial in self.trials], out, num_seeds=num_seeds, jobs=jobs)
        self.out = out

    def run(self, watch: Watch | None = None) -> dict[str, Any]:
        """Train what is not finished yet; writes `sweep.json` and, of each rule's best, `best/RULE.yaml`.

        Returns what `sweep.json` holds: `rules`, each with its `trials` (settings, `val_loss` as an interval in nats
        per token, FLOPs, how many seeds `failed`), the settings of the `best`, its `file`, and the keys whose best
        value lies `at_the_end` of the values tried. A trial with a seed that failed cannot be the best. After SIGINT
        or SIGTERM `interrupted` is the signal's number, and no best is named.
        """
        best = self.out / "best"
        if exists(best) and not best.is_dir():
            raise CheckpointError(f"{best} is no folder; pass another --out")
        self._check_best()
        results = self.study.run(watch)
        rows = {row["recipe"]: row for row in table(results["runs"], self.study.baseline)}
        answers = [self._rule(rule, rows) for rule in self.rules]
        rules = [told_of for told_of, _ in answers]
        kept = ("seeds", "corpus", "versions", "device", "created", "command", "interrupted", "elapsed_seconds")
        found = {"format": 1, "search": self.search, "overrides": self.overrides, "rules": rules}
        found |= {key: results[key] for key in kept}
        files = {self._file(rule): recipe for rule, (_, recipe) in zip(self.rules, answers, strict=True)}
        for file in (file for file, recipe in files.items() if recipe is None):
            with writing(file):
                file.unlink(missing_ok=True)
        write_json(self.out / "sweep.json", found)  # before the files that it names, which are known as a sweep's by it
        for file, recipe in files.items():
            if recipe is not None:
                write_atomically(file, write_yaml(recipe))
        return found

    def _file(self, rule: str) -> Path:
        return self.out / "best" / f"{rule}.yaml"

    def _check_best(self) -> None:
        """Refuse to replace or remove a recipe that no sweep wrote here."""
        path = self.out / "sweep.json"
        before = read_json(path, SWEEP) if exists(path) else {}
        known = {rule["recipe"] for rule in before.get("rules", []) if rule.get("file")}
        for rule in self.rules:
            if rule not in known and exists(self._file(rule)):
                raise CheckpointError(f"{self._file(rule)} is not from a sweep in {self.out}; pass another --out")

    def _rule(self, rule: str, rows: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What came of a rule's trials, and its best recipe, if there is one."""
        trials = [(trial, _row(trial, rows[trial.recipe.name])) for trial in self.trials if trial.rule == rule]
        told_of: dict[str, Any] = {"recipe": rule, "trials": [row for _, row in trials]}
        able = [pair for pair in trials if pair[1]["val_loss"] and not pair[1]["failed"]]
        if not able or any(row["unfinished"] for _, row in trials):
            return told_of | {"best": None, "at_the_end": [], "file": None}, None
        trial, row = min(able, key=lambda pair: pair[1]["val_loss"]["mean"])
        data = trial.found | {"name": rule, "tuning": self._tuning(trial.found.get("tuning"), told_of["trials"])}
        ends = [key for key, value in row["settings"].items() if _at_the_end(value, self.search[key])]
        file = str(self._file(rule).relative_to(self.out))
        return told_of | {"best": row["settings"], "at_the_end": ends, "file": file}, data

    def _tuning(self, before: Mapping[str, Any] | None, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How the best was found; what the recipe says of an earlier search stays, and its trials count."""
        seeds = self.study.seeds
        where = [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", *_told_overrides(self.overrides)]
        losses = [f"{told(row['settings'])}: {_loss(row)}" for row in trials]
        note = f"val loss ({', '.join(where)}) at {'; '.join(losses)}"
        searched: dict[str, list[Any]] = {key: list(values) for key, values in self.search.items()}
        if not before:
            return {"trials": len(trials), "seeds": len(seeds), "searched": searched, "note": note}
        for key, values in before.get("searched", {}).items():
            searched[key] = [*values, *(value for value in searched.get(key, []) if value not in values)]
        earlier = f"{before['trials']} trials" + f": {before['note']}" * bool(before.get("note"))
        return {
            "trials": before["trials"] + len(trials),
            "seeds": len(seeds),
            "searched": searched,
            "note": f"{note}; before that, {earlier}",
        }


def _trial(source: Source, settings: Settings, overrides: Sequence[str]) -> Trial:
    """One trial. Raises `RecipeError`, which names the recipe, if the settings do not fit, overridden or not."""
    rule = overridden(source, ()).get("name", "unnamed")
    chosen = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    try:
        recipe = check(overridden(source, [*overrides, *chosen]))
    except RecipeError as error:
        raise RecipeError(f"{rule}: {error}") from None
    found = overridden(source, chosen)
    try:
        check(found)
    except RecipeError as error:
        raise RecipeError(
            f"{rule}: {told(settings)} fits only with the overrides, and would not with the recipe that is found "
            f"({error}); put them into the recipe"
        ) from None
    said = {"name": trial_name(rule, settings), "description": f"{rule} with {told(settings)}", "tuning": None}
    return Trial(rule, settings, found, recipe.model_copy(update=said))


def _require_different(trials: Sequence[Trial]) -> None:
    """Raise `RecipeError` where two choices come to one recipe, since another key overrules what is searched."""
    known: dict[str, Trial] = {}
    for trial in trials:
        data = trial.recipe.dump() | {"name": "", "description": ""}
        other = known.setdefault(json.dumps(data, sort_keys=True), trial)
        if other is not trial:
            raise RecipeError(
                f"{trial.rule}: {told(other.settings)} and {told(trial.settings)} come to the same recipe, since "
                "another key overrules what differs"
            )


def _row(trial: Trial, row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("val_loss", "flops", "seeds", "failed", "unfinished")}
    return {"recipe": trial.recipe.name, "settings": trial.settings} | kept


def _at_the_end(value: Any, values: Sequence[Any]) -> bool:
    numbers = [v for v in values if is_finite(v) and not isinstance(v, bool)]
    return len(numbers) == len(values) > 1 and value in (min(numbers), max(numbers))


def _loss(row: Mapping[str, Any]) -> str:
    failed = f" ({row['failed']} failed)" * bool(row["failed"])
    return (f"{row['val_loss']['mean']:.3f}" if row["val_loss"] else "none") + failed


def _told_overrides(overrides: Sequence[str]) -> list[str]:
    """What was overridden, without what is of this machine."""
    pairs = [override.partition("=")[::2] for override in overrides]
    kept = [(key, value) for key, value in pairs if key not in ("run.threads", "run.device")]
    return [f"{key}={Path(value).name if key.endswith('path') else value}" for key, value in kept]
