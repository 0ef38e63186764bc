"""One run folder as a `Run`: what a training run wrote, read with suspicion.

What a killed process left half-written becomes a note on the page; a file that must be whole and is not, a
`CheckpointError`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from heterodox.comparison.statistics import usable
from heterodox.core.errors import CheckpointError
from heterodox.core.files import read_json

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


class _Kept(BaseModel):
    """Types of what kept files hold; other keys are not looked at."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Summary(_Kept):
    """A row of `results.json`, or a `summary.json`."""

    recipe: str | None = None
    credit: str | dict[str, Any] | None = None
    seed: int | None = None
    status: str | None = None
    message: str | None = None
    warnings: list[str] | None = None
    steps: int | None = None
    tokens: int | None = None
    meta_tokens: int | None = None
    flops: int | float | None = None
    seconds: int | float | None = None
    wall_seconds: int | float | None = None
    search_seconds: int | float | None = None
    val_step: int | None = None
    val_loss: int | float | None = None
    val_bits_per_byte: int | float | None = None
    test_loss: int | float | None = None
    activation_bytes: int | None = None
    peak_memory_bytes: int | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    unigram_loss: int | float | None = None
    floor_loss: int | float | None = None
    corpus_sha256: str | None = None
    commit: str | None = None
    device: str | None = None
    run: str | None = None
    evals: list[dict[str, int | float | str | None]] | None = None


class _Parameter(_Kept):
    origin: str
    size: int = 0
    shape: list[int] = []


class _Manifest(_Kept):
    credit: str | None = None
    parameters: dict[str, _Parameter] = {}
    remarks: list[str] = []


class _Metrics(_Kept):
    """A row of `metrics.jsonl`."""

    kind: str | None = None
    step: int = 0
    tokens: int | None = 0
    meta_tokens: int | None = 0
    flops: int | float | None = 0
    seconds: int | float | None = 0.0
    lr: int | float | None = None
    loss: int | float | None = None
    val_loss: int | float | None = None
    candidate: int = 0
    layers: dict[str, Any] | None = None
    alignment: dict[str, dict[str, int | float | None]] | None = None


class _Resolved(_Kept):
    name: str | None = None
    description: str | None = None
    resolved: dict[str, Any] | None = None


class Results(_Kept):
    """A `results.json`."""

    baseline: str | None = None
    recipes: list[_Resolved] = []
    runs: list[_Summary] = []
    corpus: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    device: str | None = None
    created: str | None = None
    command: str | None = None
    elapsed_seconds: int | float | None = None


def validated(path: Path, value: Any, model: type[_Kept]) -> Any:
    """Return `value` if it has the types that `model` says. Raises CheckpointError that names the file and the key."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in problem["loc"])
        raise CheckpointError(f"{path} is damaged: {where}: {problem['msg']}") from None
    return value


def read_run(folder: Path, notes: list[str], row: dict[str, Any] | None = None) -> Run:
    """A run from its folder; `row`, its line in results.json, goes before its own summary."""
    name = f"{folder.parent.name}/{folder.name}"
    text = _text(folder / "recipe.yaml") or ""
    config = _recipe(folder / "recipe.yaml", text)
    if row is None:
        row = validated(folder / "summary.json", read_json(folder / "summary.json") or {}, _Summary) or None
    if row is None:
        row = {"status": "interrupted", "message": "No summary: the run was killed or is still going."}
    if not folder.is_dir() and row.get("status") in ("finished", "diverged"):
        missing = "alignment" if row.get("evals") else "curves, alignment"
        notes.append(f"{name} is missing: its {missing} and samples are not shown.")
    if row.get("warnings"):
        notes.append(f"{name}, {row['warnings'][-1]} ({len(row['warnings'])} such warnings in all).")
    manifest = validated(folder / "manifest.json", read_json(folder / "manifest.json") or {}, _Manifest)
    samples = read_json(folder / "samples.json", list) or []
    found = _metrics(folder / "metrics.jsonl", name, notes)
    scores = read_json(folder / "scores.json") or {}
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
            row = json.loads(line)
        except (ValueError, RecursionError):
            damaged += number < len(lines)  # the last line of a killed process may be half of one
            continue
        try:
            yield validated(path, row, _Metrics)
        except CheckpointError:
            damaged += 1
    if damaged:
        notes.append(f"{name}: {damaged} damaged line{'s' * (damaged > 1)} of metrics.jsonl left out.")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not YAML; the file is damaged") from error
    return config if isinstance(config, dict) else {}
