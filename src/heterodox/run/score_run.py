"""Scores of a split's examples by a trained run: by the rater it trained, or by how well its model predicts them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path
from heterodox.core.types import Batch
from heterodox.data import Dataset, Split, Windows
from heterodox.data.scores import best, require_scores, write_scores
from heterodox.data.tokenizer.base import FILE_NAME
from heterodox.meta.auc import auc_by_kind
from heterodox.meta.load import load_rater, rater_options, rater_section
from heterodox.recipe import load_recipe
from heterodox.run.load import TrainedRun, load_run
from heterodox.run.saved import open_run
from heterodox.run.surface import surface_scores

BATCH = 64


Score = Callable[[Batch], Tensor]


def score_run(
    path: PathLike,
    out: PathLike,
    *,
    overrides: Iterable[str] = (),
    split: str = "train",
    keep: float | None = None,
    index: PathLike | None = None,
    noisy: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score every example of `split` by the run in `path` and write them to `out`; returns what there is to say.

    `overrides` change the run's data, and nothing else; the run's tokenizer reads what they name. With `index`, the
    ids of the best `keep` go there. `noisy` plants the recipe's noise in a held-out split first. With noise there is
    an AUC by kind. Raises `RecipeError` for other overrides or data of another tokenizer, `CorpusError`
    or `CheckpointError` for what cannot be read or written.
    """
    path, out, index = as_path(path), as_path(out), None if index is None else as_path(index)
    for file in (out, index):
        if file is not None:
            require_scores(file)
    changes = list(overrides)
    stray = [change for change in changes if change.partition("=")[0].split(".")[0] != "data"]
    if stray:
        raise RecipeError(f"a run is scored as it is, but for its data: found {stray[0]!r}, expected data.KEY=VALUE")
    if (keep is None) != (index is None):
        raise RecipeError("an index needs both --keep and --index")
    if keep is not None and not 0 < keep <= 1:
        raise RecipeError(f"--keep {keep:g} is no share to keep, expected one in (0, 1]")
    run = load_run(path, device=device)
    if changes and not any(change.startswith("data.tokenizer") for change in changes):
        changes.append(f"data.tokenizer={json.dumps({'name': 'file', 'path': str(run.folder.tokenizer / FILE_NAME)})}")
    recipe = load_recipe(run.recipe, changes)
    dataset = recipe.data.build()
    if dataset.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise RecipeError(f"{path} was trained on the ids of another tokenizer than that of the data to score")
    chosen = _split(dataset, split, noisy)
    windows = Windows(chosen, run.model.context, str(next(run.model.parameters()).device))
    ids, scores = _all_scores(windows, _scorer(run, path))
    if not np.isfinite(scores).all():
        raise CheckpointError(f"{path} gives {np.sum(~np.isfinite(scores))} of {len(ids)} examples no finite score")
    about = dataset.identify(chosen) | {"context": run.model.context, "rater": path.name}
    write_scores(out, ids, scores, about)
    answer: dict[str, Any] = {"path": str(out), "split": split, "examples": len(ids)}
    answer |= {"mean": float(scores.mean()), "std": float(scores.std())}
    if chosen.labels is not None:
        labels = chosen.labels[ids]
        answer["auc"] = auc_by_kind(scores, labels, dataset.kinds)
        surface = surface_scores(dataset, windows, run.model.context)
        answer["auc_surface"] = auc_by_kind(surface, labels, dataset.kinds)
    if index is not None and keep is not None:
        kept = best(ids, scores, keep)
        write_scores(index, np.sort(kept), None, about)
        answer |= {"index": str(index), "kept": len(kept)}
        if chosen.labels is not None:
            answer["noise_kept"] = float((chosen.labels[kept] > 0).mean())
    return answer


def _split(dataset: Dataset, split: str, noisy: bool) -> Split:
    if split not in dataset.splits:
        raise RecipeError(f"there is no split {split!r}; expected {', '.join(dataset.splits)}")
    if not noisy:
        return dataset.splits[split]
    found = dataset.noisy(split)
    if found is None:
        raise RecipeError("the data section plants no noise, so there is none to measure on; set data.corruption")
    return found


def _scorer(run: TrainedRun, path: Path) -> Score:
    """Of a batch: one score per example."""
    saved = open_run(path)
    if rater_section(saved.recipe) is not None:
        rater = load_rater(saved, rater_options(saved, path, None), path, run.model.head.weight)
        return lambda batch: rater(batch.inputs)

    def likelihood(batch: Batch) -> Tensor:
        logits = run.model(batch.inputs).float().transpose(1, 2)
        return -torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none").mean(dim=1)

    return likelihood


@torch.no_grad()
def _all_scores(windows: Windows, score: Score) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Ids and scores of all examples that are to be seen."""
    ids, scores = [], []
    for start in range(0, windows.count, BATCH):
        batch = windows.batch(np.arange(start, min(start + BATCH, windows.count)))
        ids.append(batch.ids.cpu().numpy())
        scores.append(score(batch).double().cpu().numpy())
    return np.concatenate(ids), np.concatenate(scores)
