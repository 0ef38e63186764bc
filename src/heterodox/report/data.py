"""One run folder as a `Run`: what a training run wrote, read with suspicion.

What a killed process left half-written becomes a note on the page; a file that must be whole and is not, a
`CheckpointError`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import exists, parse_yaml, read_bytes, read_json
from heterodox.core.shapes import MANIFEST, RESULTS, SAMPLES, SCORES, SUMMARY
from heterodox.report import units
from heterodox.report.statistics import (
    Number,
    architecture,
    architectures,
    is_finite,
    paired_difference,
    references,
    table,
    usable,
)
from heterodox.training.metrics import parse_row

RUN_FILES = ("summary.json", "metrics.jsonl", "recipe.yaml")


@dataclass(frozen=True)
class Run:
    """One recipe at one seed. `evals`, `probes`, `steps` (of training) and `masks` are rows of metrics.jsonl, one per
    step, in order. `candidates` are those of a search for masks, all of them.
    """

    recipe: str
    seed: int
    summary: dict[str, Any]
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    yaml: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    evals: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    masks: list[dict[str, Any]] = field(default_factory=list)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return usable(self.summary)


def read_run(folder: Path, notes: list[str], row: dict[str, Any] | None = None) -> Run:
    """A run from its folder; `row`, its line in results.json, goes before its own summary."""
    name = f"{folder.parent.name}/{folder.name}"
    text = _text(folder / "recipe.yaml") or ""
    config = _recipe(folder / "recipe.yaml", text)
    if row is None:
        row = read_json(folder / "summary.json", SUMMARY) if exists(folder / "summary.json") else None
    if row is None:
        row = {"status": "interrupted", "message": "No summary: the run was killed or is still going."}
    if not folder.is_dir() and row.get("status") in ("finished", "diverged"):
        missing = "alignment" if row.get("evals") else "curves, alignment"
        notes.append(f"{name} is missing: its {missing} and samples are not shown.")
    if row.get("warnings"):
        notes.append(f"{name}, {row['warnings'][-1]} ({len(row['warnings'])} such warnings in all).")
    manifest = read_json(folder / "manifest.json", MANIFEST) if exists(folder / "manifest.json") else {}
    samples = read_json(folder / "samples.json", SAMPLES) if exists(folder / "samples.json") else []
    found = _metrics(folder / "metrics.jsonl", name, notes)
    scores = read_json(folder / "scores.json", SCORES) if exists(folder / "scores.json") else {}
    seed = re.fullmatch(r"seed-(\d+)", folder.name)
    seed = row.get("seed", config.get("seed", int(seed[1]) if seed else 0))
    recipe = str(row.get("recipe") or config.get("name") or folder.parent.name)
    credit = row.get("credit") or manifest.get("credit") or config.get("credit")
    credit = credit.get("name") if isinstance(credit, dict) else credit
    summary = row | {"seed": seed, "credit": credit}
    evals, probes, steps, masks = ([rows[key] for key in sorted(rows)] for rows in found[:4])
    evals = evals or [kept for kept in row.get("evals") or [] if isinstance(kept, dict)]
    candidates = [found[4][key] for key in sorted(found[4])]
    return Run(
        recipe, seed, summary, folder, config, text, manifest, evals, probes, steps, samples, masks, candidates, scores
    )


def _metrics(path: Path, name: str, notes: list[str]) -> tuple[dict, dict, dict, dict, dict]:
    """Rows of evaluations, probes, training and masks by step, and of candidates by step and number.

    A step logged again after a resume replaces its first row.
    """
    evals: dict[int, dict] = {}
    probes: dict[int, dict] = {}
    steps: dict[int, dict] = {}
    masks: dict[int, dict] = {}
    candidates: dict[tuple[int, int], dict] = {}
    meta_tokens = 0
    for row in _lines(path, name, notes):
        step = row.get("step", 0)
        if row.get("kind") == "train":
            meta_tokens = row.get("meta_tokens") or 0
            steps[step] = row
        elif row.get("kind") == "eval":
            evals[step] = {"meta_tokens": meta_tokens} | row
        elif row.get("kind") == "probe":
            probes[step] = row
        elif row.get("kind") == "mask":
            masks[step] = row
        elif row.get("kind") == "candidate":
            candidates[step, row.get("candidate", 0)] = row
    return evals, probes, steps, masks, candidates


def _lines(path: Path, name: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    lines = (_text(path) or "").split("\n")
    damaged = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield parse_row(line)
        except ValueError:
            damaged += number < len(lines)  # the last line of a killed process may be half of one
    if damaged:
        notes.append(f"{name}: {damaged} damaged line{'s' * (damaged > 1)} of metrics.jsonl left out.")


def _text(path: Path) -> str | None:
    return read_bytes(path).decode(errors="replace") if exists(path) else None


def _recipe(path: Path, text: str) -> dict[str, Any]:
    config = parse_yaml(text, path)
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


# Folders of studies and runs, merged into one `Study`.
#
# A study folder holds `results.json` and `runs/`; a run folder holds one recipe at one seed.


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


# The result in plain words, made from the numbers and from nothing else.


FEW = 6  # rules that one sentence can hold


def headline(study: Study, table: Sequence[dict[str, Any]]) -> str:
    """One sentence: how much of the gap each rule closes, or how far from the baseline it ends."""
    rows = {row["recipe"]: row for row in table if row["val_loss"]}
    if not rows:
        return "No run finished, so there is nothing to compare."
    base, floor = study.baseline, head_only(study)
    if base in rows and floor in rows:
        closed = {
            name: row["gap_closed"]
            for name, row in rows.items()
            if name not in (base, floor) and row["gap_closed"] is not None and study.bounds[name] == (floor, base)
        }
        between = f"the gap between {_at(rows[floor])} and {_at(rows[base])}"
        if closed:
            return _gap(closed, between, floor, base)
        if len(rows) == 2:
            return f"Nothing stands yet in {between}: both are references."
        return f"The gap is not there to close: {_at(rows[floor])} does not end above {_at(rows[base])}."
    others = sorted((row for name, row in rows.items() if name != base), key=lambda r: r["val_loss"]["mean"])
    if base in rows and others:
        ends = [f"{row['recipe']} {_apart(row)}" for row in others[:FEW]]
        return f"Against {_at(rows[base])}, in nats per token: {'; '.join(ends)}."
    ends = [f"{row['recipe']} at {units.loss(row['val_loss']['mean'])}" for row in rows.values()]
    return f"Validation loss in nats per token: {'; '.join(ends[:FEW])}."


def remarks(study: Study, table: Sequence[dict[str, Any]], unigram: Number | None) -> list[str]:
    """What a careful reader would add: how many seeds, what is within chance, what failed, what cost more."""
    rows = [row for row in table if row["val_loss"]]
    said = [_seeds(rows)] if rows else []
    chance = [row["recipe"] for row in rows if _includes_zero(row["difference"])]
    if chance:
        said.append(f"Not told apart from {study.baseline}, as the interval includes 0: {', '.join(chance)}.")
    said += _untrained(study, rows)
    if head_only(study) is None and len(rows) > 1 and study.baseline is not None:
        said.append("No floor (head_only) in this study: the gap closed is not given.")
    elif study.baseline is not None:
        without: dict[str, list[str]] = {}
        for row in rows:
            if row["gap_missing"]:
                without.setdefault(row["gap_missing"], []).append(row["recipe"])
        said += [f"No gap closed for {', '.join(names)}: {reason}." for reason, names in without.items()]
    above = [row["recipe"] for row in rows if is_finite(unigram) and row["val_loss"]["mean"] >= unigram]
    if above:
        said.append(f"No better than guessing by token frequency alone (unigram entropy): {', '.join(above)}.")
    for word, reason in (("failed", "they failed or diverged"), ("unfinished", "they have not ended yet")):
        counts = [(row["recipe"], row[word], row["seeds"] + row["failed"] + row["unfinished"]) for row in table]
        left_out = [f"{name} ({number} of {every})" for name, number, every in counts if number]
        if left_out:
            said.append(f"Left out because {reason}: {', '.join(left_out)}.")
    charged = [(row["tokens"] or 0) + (row["meta_tokens"] or 0) for row in rows]
    if charged and max(charged) > 1.01 * min(charged):
        span = f"{units.count(min(charged))} to {units.count(max(charged))}"
        said.append(f"The runs did not consume equally many tokens ({span}): read the curves before the table.")
    windows = [text for text in dict.fromkeys(_windows(run.config) for run in study.runs) if text is not None]
    if len(windows) > 1:
        said.append(f"Not evaluated on the same windows ({'; '.join(windows)}): their losses cannot be compared.")
    return said


def head_only(study: Study) -> str | None:
    """Return the floor of the baseline's model: the first recipe on it whose blocks stay as initialised."""
    if study.baseline is None:
        return next((run.recipe for run in study.runs if run.summary.get("credit") == "head_only"), None)
    return study.bounds[study.baseline][0]


def _gap(closed: dict[str, Number], between: str, floor: str | None, base: str | None) -> str:
    ranked = sorted(closed.items(), key=lambda item: -item[1])
    parts = []
    for name, share in ranked[:FEW]:
        if share < -0.005:
            parts.append(f"{name} ends above {floor} ({units.percent(share)})")
        elif share > 1.005:
            parts.append(f"{name} ends below {base} ({units.percent(share)})")
        else:
            parts.append(f"{name} closes {units.percent(share)}")
    others = [share for _, share in ranked[FEW:]]
    ends = dict.fromkeys(units.percent(share) for share in (min(others), max(others))) if others else ()
    more = f"; {len(others)} more: {' to '.join(ends)}" if others else ""
    return f"Of {between}, {'; '.join(parts)}{more}."


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    numbers = sorted({row["seeds"] for row in rows})
    if numbers == [1]:
        return "One seed: no interval, so a small difference may be chance."
    many = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    fewer = "; at least 3 are needed for a claim" if numbers[0] < 3 else ""
    return f"{many} seeds per recipe; intervals are 95 % (Student t), differences paired by seed{fewer}."


def _untrained(study: Study, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the rules whose loss is not below their model's head_only by more than chance, by the paired interval."""
    losses = {
        row["recipe"]: {run.seed: run.summary["val_loss"] for run in study.of(row["recipe"]) if run.finished}
        for row in rows
    }
    unproven: dict[str, list[str]] = {}
    for name, (floor, _) in study.bounds.items():
        if floor not in losses or name not in losses or name == floor:
            continue
        difference = paired_difference(losses[name], losses[floor])
        if difference is None or difference.mean >= 0 or (difference.high is not None and difference.high >= 0):
            unproven.setdefault(floor, []).append(name)
    return [
        f"Not shown to train the blocks (not below {floor} beyond chance): {', '.join(names)}."
        for floor, names in unproven.items()
    ]


def _windows(config: Mapping[str, Any]) -> str | None:
    """Which windows a run was evaluated on; None if its recipe does not say."""
    context, run = (config.get("model") or {}).get("context"), config.get("run") or {}
    if context is None or "eval_batches" not in run or "eval_batch_size" not in run:
        return None
    many = "all" if run["eval_batches"] is None else f"{run['eval_batches'] * run['eval_batch_size']:,}"
    return f"{many} of {context} tokens"


def _includes_zero(difference: dict[str, Any] | None) -> bool:
    return bool(difference) and difference["low"] is not None and difference["low"] <= 0 <= difference["high"]


def _at(row: dict[str, Any]) -> str:
    return f"{row['recipe']} ({units.loss(row['val_loss']['mean'])})"


def _apart(row: dict[str, Any]) -> str:
    difference = row["difference"]
    if difference is None:
        return f"ends at {units.loss(row['val_loss']['mean'])}, on other seeds"
    interval = f" [{units.signed(difference['low'])}, {units.signed(difference['high'])}]" * (difference["n"] > 1)
    return f"ends {units.signed(difference['mean'])}{interval}"


# The setting of a study in a line: model, batch, steps, update, with all values that its recipes have.


SHOWN = 3


def setting(study: Study) -> str:
    """What the recipes say of these; nothing for runs that came without their recipes."""
    entries = [entry for header in study.headers for entry in header.get("recipes", [])]
    recipes = [entry["resolved"] for entry in entries if entry.get("resolved")]
    values = {what: _values(recipes, keys) for what, keys in KEYS.items()}
    told = [what.format(_any_of(found)) for what, found in values.items() if found]
    return ", ".join(told)


KEYS = {
    "{}": ("model", "name"),
    "layers {}": ("model", "layers"),
    "heads {}": ("model", "heads"),
    "width {}": ("model", "width"),
    "context {}": ("model", "context"),
    "batch {}": ("run", "batch_size"),
    "steps {}": ("run", "budget", "steps"),
    "warm-up {}": ("run", "warmup_steps"),
    "then {}": ("run", "schedule"),
}


def _values(recipes: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Any]:
    """The different values under these keys, in the recipes' order."""
    found: dict[Any, None] = {}
    for recipe in recipes:
        value: Any = recipe
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[value] = None
    return list(found)


def _any_of(values: Sequence[Any]) -> str:
    shown = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
    if len(values) <= SHOWN or not all(isinstance(value, int) for value in values):
        return " or ".join(shown)
    return f"{min(values):,} to {max(values):,}"
