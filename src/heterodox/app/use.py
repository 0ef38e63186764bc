"""What is done with a run that has trained: open it, generate, probe, score."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from heterodox.app.export import read_sparse
from heterodox.app.folder import open_run
from heterodox.app.load import TrainedRun, load_run
from heterodox.app.recipe import load_recipe
from heterodox.app.session import build_learner, supply_of
from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path, reading
from heterodox.core.rng import Streams
from heterodox.core.state import restoring
from heterodox.core.types import Alignment, Batch
from heterodox.data import Dataset, Split, Windows
from heterodox.data.scores import best, require_scores, write_scores
from heterodox.data.tokenizers import FILE_NAME, Tokenizer, continuation
from heterodox.learner import Gradient
from heterodox.learner.probe import alignment, exact_gradients
from heterodox.meta.rater import auc_by_kind
from heterodox.meta.training import load_rater, rater_options, rater_section
from heterodox.model import generate

# Text from a trained run.


def generate_run(
    path: PathLike,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    checkpoint: str | None = None,
    device: str = "cpu",
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that the run's model puts behind `prompt`; `on_text` hears the prompt and each piece as it comes.

    `path` is a run folder, or a file that `export --format sparse` wrote, which has no `checkpoint` to choose.
    Raises `RecipeError` for an empty prompt, `CorpusError` for one with characters that the tokenizer lacks.
    """
    if not temperature >= 0:
        raise RecipeError(f"temperature is {temperature}, expected 0 or more")
    path = as_path(path)
    if top_p is not None and not 0 < top_p <= 1:
        raise RecipeError(f"top-p is {top_p}, expected above 0 and at most 1")
    with reading(path):
        single = path.is_file()
    if checkpoint is not None and single:
        raise RecipeError(f"{path} is a file, which holds no checkpoints: leave out --checkpoint, or name a run folder")
    run = read_sparse(path, device) if single else load_run(path, checkpoint, device)
    start = [int(token) for token in run.tokenizer.encode(prompt)]
    if not start:
        raise RecipeError("the prompt is empty; give --prompt at least one character")
    say = on_text or (lambda text: None)
    say(prompt)
    written: list[int] = []
    said = ""

    def listen(chosen: torch.Tensor) -> None:
        nonlocal said
        written.append(int(chosen[0]))
        text = continuation(run.tokenizer, start, written)
        if not text.endswith("\ufffd"):  # wait for the rest of a character
            say(text[len(said) :])
            said = text

    generate(
        run.model,
        torch.tensor([start], device=run.model.head.weight.device),
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=run.tokenizer.vocab_size,
        generator=Streams(seed).generator("eval", "generate"),
        on_token=listen,
    )
    text = continuation(run.tokenizer, start, written)
    say(text[len(said) :])
    return text


# The alignment of a trained run's rule with the exact gradient.


def probe_run(path: PathLike, checkpoint: str | None = None, num_batches: int = 1) -> list[dict[str, Any]]:
    """Cosine, norm ratio and sign agreement of the run's rule with the exact gradient, by parameter.

    Means over the next `num_batches` training batches; None where a measure is undefined on each of them.
    Raises `CheckpointError` if the corpus has changed since.
    """
    run = load_run(path, checkpoint)
    dataset = run.recipe.data.build()
    if dataset.corpus_sha256 != run.corpus_sha256:
        raise CheckpointError(f"{path} was trained on another corpus than the one that its recipe names now")
    streams, comm = Streams(run.recipe.seed), Solo()
    supply = supply_of(run.recipe, dataset, streams, comm)
    learner = build_learner(run.recipe, run.model, comm, supply, dataset.tokenizer.fingerprint)
    if not isinstance(learner, Gradient):
        raise CheckpointError(f"{path} is a run of the learner {run.recipe.learner.name}: it has no signal to compare")
    with restoring(run.folder.path):
        learner.load_state(run.learner_state)
    run.model.train()
    loader = supply("train", run.recipe.rating.drawn(run.recipe.run.batch_size))
    with restoring(run.folder.path):
        loader.load_state(run.loader_state)
    reports: list[Alignment] = []
    for index in range(num_batches):
        batch = loader.next_batch()
        batch, weights = learner.rate(batch)
        seed = streams.derive("dropout", run.step + 1 + index, 0)  # that of the step which would take this batch
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            signal = learner.credit.signal(run.model, batch, weights, learner.objective)
            torch.manual_seed(seed)
            exact = exact_gradients(run.model, batch, weights, learner.objective, comm)
        reports.append(alignment(signal.grads, exact))
    return [
        {"parameter": name} | {key: _mean(report[name][key] for report in reports) for key in measures}
        for name, measures in reports[0].items()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# The baseline that a rater must beat: a linear model of what can be seen without reading.
#
#     s = a + b · (characters of the example) + c · (share of them that are neither letters nor digits)
#
# fitted by least squares to the labels of planted noise in train: unlike the rater, it is told what is noise.


FITTED = 4096
"""Examples of train that it is fitted to, at most."""


def surface_scores(dataset: Dataset, windows: Windows, context: int) -> Float[np.ndarray, " examples"]:
    """The score of every example of `windows`, higher for what looks cleaner."""
    train = dataset.splits["train"]
    assert train.labels is not None, "there is no planted noise to fit to"
    known = Windows(train, context)
    seen = features(dataset.tokenizer, known, min(known.count, FITTED))
    clean = (train.labels[: len(seen)] == 0).astype(np.float64)
    weights = np.linalg.lstsq(seen, clean, rcond=None)[0]
    return features(dataset.tokenizer, windows, windows.count) @ weights


def features(tokenizer: Tokenizer, windows: Windows, count: int) -> Float[np.ndarray, "examples 3"]:
    """1, length and share of characters that are neither letters nor digits, of the first `count` examples."""
    rows = []
    for ids in np.array_split(np.arange(count), max(1, count // 256)):
        for tokens in windows.batch(ids).inputs.cpu().numpy():
            text = tokenizer.decode(tokens)
            other = sum(not character.isalnum() for character in text)
            rows.append([1.0, float(len(text)), other / max(1, len(text))])
    return np.array(rows)


# Scores of a split's examples by a trained run: by the rater it trained, or by how well its model predicts them.


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
