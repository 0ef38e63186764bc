"""Folders of studies and runs, merged into one `Study`.

A study folder holds `results.json` and `runs/`; a run folder holds one recipe at one seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heterodox.comparison.statistics import architecture, architectures, references, table
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import exists, read_json
from heterodox.core.shapes import RESULTS
from heterodox.report.read import RUN_FILES, Run, read_run

FORMAT = 1


@dataclass(frozen=True)
class Study:
    """All that a page is made of. `headers` are the results.json files without runs and table."""

    runs: list[Run]
    baseline: str | None
    descriptions: dict[str, str]
    headers: list[dict[str, Any]]
    notes: list[str]

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(run.recipe for run in self.runs))

    @property
    def models(self) -> dict[str, str]:
        """The architecture of each recipe, as far as it is known."""
        known = architectures(entry for header in self.headers for entry in header.get("recipes", []))
        return {run.recipe: architecture(run.config.get("model")) or known.get(run.recipe, "") for run in self.runs}

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each recipe; see `statistics.table`."""
        return table([run.summary for run in self.runs], self.baseline or "", self.models)

    @property
    def bounds(self) -> dict[str, tuple[str | None, str | None]]:
        """The names of each recipe's floor and ceiling; see `statistics.references`."""
        return references([run.summary for run in self.runs], self.baseline or "", self.models)

    def of(self, recipe: str) -> list[Run]:
        return [run for run in self.runs if run.recipe == recipe]


def read_study(folders: Sequence[Path], rules: Sequence[str] = ()) -> Study:
    """Read and merge study and run folders.

    Runs of one name are seeds of one recipe only if their resolved recipes agree and no seed comes twice;
    otherwise the later folder's recipe gets that folder's name in brackets. With `rules`, only those recipes are
    kept, and without its baseline a study has none. Raises CheckpointError when a folder is neither a study nor a
    run, or when a file that must be whole is damaged; RecipeError for one of `rules` that no run is of.
    """
    if not folders:
        raise CheckpointError("a report needs at least one study or run folder, got none")
    runs: list[Run] = []
    headers: list[dict[str, Any]] = []
    notes: list[tuple[str | None, str]] = []
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        header, found, said = _read_folder(folder)
        found = [run for run in found if run.folder not in {other.folder for other in runs}]
        names = {run.recipe: _free_name(run.recipe, found, runs, folder) for run in found}
        notes += [(names.get(name) if name else None, note) for name, note in said if name is None or name in names]
        notes += [(new, f"“{new}” stands beside another “{old}”.") for old, new in names.items() if old != new]
        runs += [replace(run, recipe=names[run.recipe]) for run in found]
        if "recipes" in header:
            header["recipes"] = [r | {"name": names.get(r.get("name"), r.get("name"))} for r in header["recipes"]]
        headers.append(header)
    if not runs:
        raise CheckpointError(f"no run in {', '.join(map(str, folders))}: nothing to report yet")
    runs = [replace(run, summary=run.summary | {"recipe": run.recipe}) for run in runs]
    baseline = _baseline(runs, headers)
    runs = _chosen(runs, rules)
    recipes = {run.recipe for run in runs}
    headers = [_only(header, recipes) for header in headers]
    descriptions: dict[str, str] = {}
    for recipe in (recipe for header in headers for recipe in header.get("recipes", [])):
        descriptions.setdefault(recipe.get("name"), recipe.get("description") or "")
    told = [note for name, note in notes if name is None or name in recipes]
    return Study(runs, baseline if baseline in recipes else None, descriptions, headers, told)


def _baseline(runs: Sequence[Run], headers: Sequence[dict[str, Any]]) -> str | None:
    recipes = {run.recipe for run in runs}
    named = next((h["baseline"] for h in headers if h.get("baseline") in recipes), None)
    if named is not None:
        return named
    exact = [run.recipe for run in runs if run.summary.get("credit") == "backprop"]
    return "backprop" if "backprop" in exact else next(iter(exact), None)


def _chosen(runs: list[Run], rules: Sequence[str]) -> list[Run]:
    names = list(dict.fromkeys(run.recipe for run in runs))
    if unknown := [name for name in rules if name not in names]:
        raise RecipeError(f"no run of {', '.join(unknown)}; there are runs of {', '.join(names)}")
    return [run for run in runs if not rules or run.recipe in rules]


def _only(header: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """The header with those of its recipes that are kept."""
    if "recipes" not in header:
        return header
    return header | {"recipes": [recipe for recipe in header["recipes"] if recipe.get("name") in kept]}


Found = tuple[dict[str, Any], list[Run], list[tuple[str | None, str]]]
"""A header, runs, and notes with the recipe that each is about, if it is about one."""


def _read_folder(folder: Path) -> Found:
    if exists(folder / "results.json"):
        results = read_json(folder / "results.json", RESULTS)
        if results.get("format") != FORMAT:
            found = f"{folder / 'results.json'} has format {results.get('format')!r}"
            raise CheckpointError(f"{found}; this version of heterodox reads {FORMAT}")
        rows = results.get("runs", [])
        if any("recipe" not in row or "seed" not in row for row in rows):
            raise CheckpointError(f"{folder / 'results.json'} lists a run without recipe or seed")
        header = {key: value for key, value in results.items() if key not in ("runs", "table")}
        return header, *_read_runs([(folder / _run_path(row), row) for row in rows])
    if any(exists(folder / name) for name in RUN_FILES):
        return _with_header(*_read_runs([(folder, None)]))
    inside = sorted(path for path in folder.glob("runs/*/seed-*") if path.is_dir())
    if inside:
        runs, notes = _read_runs([(path, None) for path in inside])
        unended = (None, f"{folder.name} has no results.json: the comparison did not end.")
        return _with_header(runs, [unended, *notes])
    found = "neither holds results.json nor a run's files" if folder.is_dir() else "is no folder"
    raise CheckpointError(f"{folder} {found}; give the --out of a comparison or of a training run")


def _gathered(notes: Sequence[tuple[str | None, str]]) -> list[tuple[str | None, str]]:
    """Put what is said of several runs' folders alike into one note: `a/seed-0 and 47 more are missing: …`."""
    alike: dict[str, list[tuple[str | None, str]]] = {}
    for name, note in notes:
        alike.setdefault(note.partition(" is missing: ")[2], []).append((name, note))
    found = alike.pop("", [])
    for what, group in alike.items():
        name, note = group[0]
        first = note.partition(" is missing: ")[0]
        found.append(
            (name, note)
            if len(group) == 1
            else (None, f"{first} and {len(group) - 1} more are missing: {what.replace('its ', 'their ')}")
        )
    return found


def _read_runs(places: Sequence[tuple[Path, dict[str, Any] | None]]) -> tuple[list[Run], list[tuple[str | None, str]]]:
    runs: list[Run] = []
    notes: list[tuple[str | None, str]] = []
    for path, row in places:
        own: list[str] = []
        runs.append(read_run(path, own, row))
        notes += [(runs[-1].recipe, note) for note in own]
    return runs, _gathered(notes)


def _with_header(runs: list[Run], notes: list[tuple[str | None, str]]) -> Found:
    """With what a results.json would say of runs that have none, as far as they know it."""
    return {key: runs[0].summary.get(key) for key in ("corpus", "device")}, runs, notes


def _run_path(row: dict[str, Any]) -> str:
    return row.get("run") or f"runs/{row['recipe']}/seed-{row['seed']}"


def _free_name(recipe: str, found: list[Run], runs: list[Run], folder: Path) -> str:
    mine = [run for run in found if run.recipe == recipe]
    same = [run for run in runs if run.recipe == recipe]
    seeds = {run.seed for run in same}
    if not same or (_core(mine[0]) == _core(same[0]) and not any(run.seed in seeds for run in mine)):
        return recipe
    label = f"{folder.parent.name}/{folder.name}" if folder.name.startswith("seed-") else folder.name
    taken = {run.recipe for run in runs}
    names = [f"{recipe} ({label})", *(f"{recipe} ({label}, {n})" for n in range(2, len(runs) + 3))]
    return next(name for name in names if name not in taken)


def _core(run: Run) -> dict[str, Any]:
    """The resolved recipe without what may differ between seeds of one recipe, run on different machines."""
    core = {key: value for key, value in run.config.items() if key not in ("seed", "description", "log")}
    if isinstance(core.get("run"), dict):
        core["run"] = {key: value for key, value in core["run"].items() if key not in ("threads", "device")}
    return core
