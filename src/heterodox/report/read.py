"""One run folder as a `Run`: what a training run wrote, read with suspicion.

What a killed process left half-written becomes a note on the page; a file that must be whole and is not, a
`CheckpointError`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterodox.comparison.statistics import usable
from heterodox.core.files import exists, parse_yaml, read_bytes, read_json
from heterodox.core.shapes import MANIFEST, SAMPLES, SCORES, SUMMARY
from heterodox.log.jsonl import parse_row

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
