"""One run from a recipe to its folder."""

import contextlib
import functools
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heterodox.app.folder import FREE, RunFolder, first_difference
from heterodox.app.recipe import Recipe
from heterodox.app.session import Session, choose_device, open_session, set_threads, weights_fingerprint
from heterodox.core.comm import Comm, connect
from heterodox.core.errors import CheckpointError
from heterodox.core.files import PathLike, as_path, writing
from heterodox.core.protocols import LanguageModel, Scoring
from heterodox.data.tokenizers import continuation
from heterodox.meta.rater import auc_by_kind
from heterodox.model import generate
from heterodox.training.evaluation import bits_per_byte, evaluate
from heterodox.training.interrupt import Interrupt
from heterodox.training.loop import Trainer
from heterodox.training.metrics import MetricsFile
from heterodox.training.recorder import Observer, TensorBoard, require_tensorboard

# Which commit of its source the package runs from.


SOURCE = Path(__file__).parents[1]


@functools.cache
def commit(source: Path = SOURCE) -> str | None:
    """Twelve digits of the commit that `source` is checked out at, a `+` behind them if a file in it differs.

    None where `source` is in no repository of its own, as in an installed package, or git is not there. Asked once: a
    checkout may move on while a run lasts.
    """
    git = shutil.which("git")
    if git is None or _ask(git, source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _ask(git, source, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + "+" * bool(_ask(git, source, "status", "--porcelain", "."))


def _ask(git: str, folder: Path, *arguments: str) -> str | None:
    answer = subprocess.run([git, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return None if answer.returncode else answer.stdout.strip()


# What a run's rater thinks of held-out examples: a histogram of scores by kind, for the report.


BINS = 40


def score_histogram(session: Session) -> dict[str, Any] | None:
    """Edges of the bins, counts by kind, AUC by kind of noise; None for a learner whose scores are none, or not finite.

    The examples are those of val, with the noise of train planted in them where there is any.
    """
    learner = session.learner
    if not isinstance(learner, Scoring):
        return None
    known = session.labelled_batches
    batches = [entry.batch for entry in known] if known else [b.to(session.device) for b in session.val_batches]
    if not batches:
        return None
    scores = np.concatenate([learner.scores(batch).double().cpu().numpy() for batch in batches])
    if not np.isfinite(scores).all():
        return None
    edges = np.histogram_bin_edges(scores, BINS)
    if not known:
        return {"edges": edges.tolist(), "counts": {"all": np.histogram(scores, edges)[0].tolist()}, "auc": {}}
    labels, kinds = np.concatenate([entry.labels.cpu().numpy() for entry in known]), known[0].kinds
    counts = {
        name: np.histogram(scores[labels == number], edges)[0].tolist() for number, name in enumerate(("clean", *kinds))
    }
    return {"edges": edges.tolist(), "counts": counts, "auc": auc_by_kind(scores, labels, kinds)}


@dataclass
class Run:
    """What a run left: its folder, its `summary.json`, and the model as it is now."""

    folder: Path
    summary: dict[str, Any]
    model: LanguageModel
    signal: int | None = None


def train(
    recipe: Recipe,
    out: PathLike,
    *,
    resume: bool = False,
    checkpoint: str | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Train `recipe` in the folder `out`, by `torchrun`'s ranks together if there are any.

    `resume` goes on from `checkpoint` (default: the latest) if `out` holds one, and starts afresh if it does not.
    Raises `RecipeError`, `CorpusError` or `CheckpointError`, for bad input before anything is written or lost.
    """
    if checkpoint is not None and not resume:
        raise CheckpointError(f"checkpoint {checkpoint!r} is only for going on: pass --resume too")
    if recipe.log.tensorboard:
        require_tensorboard()
    out = as_path(out)
    source = commit()
    set_threads(recipe.run.threads)
    device = choose_device(recipe.run.device)
    if device != "cpu":
        torch.cuda.set_device(device)
    folder = RunFolder(out, recipe.run.keep_checkpoints)
    with connect(device) as comm, contextlib.ExitStack() as stack:
        going_on = comm.together(lambda: _check_folder(folder, recipe, resume, checkpoint))
        comm.require_agreement("run folder: on one of them the run goes on, on the other it begins", str(going_on))
        early = comm.rank == 0 and folder.exists()
        if early:  # before a checkpoint is read that another process may be about to drop
            stack.enter_context(folder.lock())
        session = open_session(recipe, comm, device)
        trainer = Trainer(session, folder.checkpoints)
        if going_on:
            comm.together(lambda: trainer.resume(checkpoint))
            comm.require_agreement("checkpoint", f"{trainer.progress.step} {weights_fingerprint(session.model)}")
        if comm.rank == 0:
            if not early:  # only now, so that bad input leaves no folder behind
                stack.enter_context(folder.lock())
            if _check_folder(folder, recipe, resume, checkpoint) != going_on:
                raise CheckpointError(f"another process has just trained in {folder.path}; look at what it left")
            if going_on:
                folder.checkpoints.drop_after(trainer.progress.step)
            _describe(folder, recipe, session)
            trainer.recorder.observers = _observers(folder, recipe, trainer.progress.step, observers, stack)
        comm.barrier()
        with Interrupt() as interrupt:
            status = trainer.run(interrupt)
            summary = _summarise(session, trainer, status, comm) | {"commit": source}
            if comm.rank == 0:
                folder.write_json("summary.json", summary)  # first: what comes after costs no run
                if status == "finished":
                    folder.write_json("samples.json", _samples(session))
                    if histogram := score_histogram(session):
                        folder.write_json("scores.json", histogram)
    return Run(out, summary, session.model, interrupt.received)


def _check_folder(folder: RunFolder, recipe: Recipe, resume: bool, checkpoint: str | None) -> bool:
    """Whether to go on from a checkpoint there. Refuses to overwrite a run, or to go on with another recipe."""
    folder.require_whole()
    if not folder.exists():
        if checkpoint is not None:
            raise CheckpointError(f"{folder.path} holds no run, so there is no checkpoint {checkpoint!r}")
        return False
    if not resume:
        raise CheckpointError(f"{folder.path} already holds a run; pass --resume to go on, or another --out")
    free = (*FREE, "run.budget", "data.corpus.path")  # the checkpoint knows the corpus by its SHA-256
    difference = first_difference(folder.read_recipe(), recipe.dump(), free)
    if difference:
        key, there, here = difference
        raise CheckpointError(
            f"{folder.path} holds a run of another recipe: {key} is {there!r} there and {here!r} here; "
            "pass another --out"
        )
    return bool(folder.checkpoints.names()) or checkpoint is not None


def _observers(
    folder: RunFolder, recipe: Recipe, step: int, others: Sequence[Observer], stack: contextlib.ExitStack
) -> list[Observer]:
    """The run's own observers, of what comes after `step`, and the `others`; `stack` closes them all."""
    for other in others:
        stack.callback(other.close)
    own: list[Observer] = [MetricsFile(folder.metrics, step)]
    stack.callback(own[0].close)
    if recipe.log.tensorboard:
        own.append(TensorBoard(folder.path / "tensorboard", step))
        stack.callback(own[1].close)
    return [*own, *others]


def _describe(folder: RunFolder, recipe: Recipe, session: Session) -> None:
    """Everything that is known before the first step. A summary of the run that was resumed no longer holds."""
    folder.write_text("recipe.yaml", recipe.to_yaml())
    folder.write_json("manifest.json", session.manifest())
    with writing(folder.tokenizer):
        session.dataset.tokenizer.save(folder.tokenizer)
        (folder.path / "summary.json").unlink(missing_ok=True)


def _summarise(session: Session, trainer: Trainer, status: str, comm: Comm) -> dict[str, Any]:
    dataset, model = session.dataset, session.model
    test_loss = evaluate(model, session.test_batches, comm) if status == "finished" else None
    val_loss = trainer.val_loss
    return {
        "recipe": session.recipe.name,
        "credit": session.recipe.credit.name,
        "seed": session.recipe.seed,
        "status": status,
        "message": trainer.message,
        "warnings": trainer.warnings,
        "val_step": trainer.evaluated_step,
        "val_loss": val_loss,
        "val_bits_per_byte": None
        if val_loss is None
        else bits_per_byte(val_loss, dataset.splits["val"].bytes_per_token),
        "test_loss": test_loss,
        **{("steps" if key == "step" else key): value for key, value in trainer.progress.as_dict().items()},
        "search_seconds": session.learner.search_seconds,
        "wall_seconds": trainer.wall_seconds,
        "activation_bytes": trainer.activation_bytes,
        "peak_memory_bytes": _peak_memory(session.device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": sum(p.numel() for p in model.parameters()) - session.learner.num_masked,
        "unigram_loss": dataset.unigram_loss("val"),
        "floor_loss": dataset.floor(session.recipe.model.context),
        "corpus_sha256": dataset.corpus_sha256,
        "corpus": dataset.describe(),
        "device": session.device,
        "ranks": comm.world_size,
        "threads": torch.get_num_threads(),
    }


def _samples(session: Session) -> list[dict[str, Any]]:
    sampling, tokenizer = session.recipe.run.sampling, session.dataset.tokenizer
    if not sampling.tokens:
        return []
    start = session.prompt
    tokens = generate(
        session.model,
        torch.tensor([start], device=session.device),
        sampling.tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        vocab_size=tokenizer.vocab_size,
        generator=session.streams.generator("eval", "samples"),
    )[0].tolist()
    return [
        {
            "prompt": tokenizer.decode(start),
            "text": continuation(tokenizer, start, tokens[len(start) :]),
            "temperature": sampling.temperature,
        }
    ]


def _peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or of the whole process on a CPU (interpreter and libraries included)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
