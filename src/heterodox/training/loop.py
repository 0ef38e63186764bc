"""The training loop: step, log, evaluate, probe, checkpoint, until the budget is spent."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from heterodox.core.comm import Comm
from heterodox.core.errors import CheckpointError
from heterodox.core.protocols import LanguageModel, Learner
from heterodox.core.services import Batches
from heterodox.core.state import map_tensors, restore, restoring
from heterodox.core.types import Batch, Cost, Diagnosis, LabelledBatch
from heterodox.data.dataset import Dataset
from heterodox.training.checkpoint import Checkpoints, require_run
from heterodox.training.config import Budget, RunConfig
from heterodox.training.evaluation import bits_per_byte, evaluate
from heterodox.training.interrupt import Interrupt
from heterodox.training.recorder import REMEDIES, Diverged, Observer, Recorder, finite

# What a run has consumed, and how much of its budget is left.


@dataclass
class Progress:
    """Totals over all ranks; `seconds` are spent in training steps alone.

    `sparse_flops` are what `flops` would be if masked weights cost nothing.
    """

    step: int = 0
    tokens: int = 0
    meta_tokens: int = 0
    flops: int = 0
    sparse_flops: int = 0
    seconds: float = 0.0

    def advance(self, cost: Cost, ranks: int) -> None:
        self.step += 1
        self.tokens += cost.tokens * ranks
        self.meta_tokens += cost.meta_tokens * ranks
        self.flops += cost.flops * ranks
        self.sparse_flops += (cost.flops - cost.masked_flops) * ranks

    def spent(self, budget: Budget) -> float:
        """The share of the budget that is gone; 1 or more: stop."""
        amount = {
            "steps": self.step,
            "tokens": self.tokens + self.meta_tokens,
            "flops": self.flops,
            "seconds": self.seconds,
        }[budget.unit]
        return amount / budget.limit

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def lr_scale(config: RunConfig, progress: Progress) -> float:
    """The factor on the learning rate for the coming step: linear warm-up, then the schedule over the budget."""
    warmup = min(1.0, (progress.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return warmup
    done = progress.spent(config.budget)
    if config.budget.steps is not None:  # the cosine begins where the warm-up ends
        done = max(0.0, progress.step - config.warmup_steps) / (config.budget.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return warmup * (config.final_lr + (1 - config.final_lr) * cosine)


class TrainingSession(ABC):
    """What the loop asks of a run: its parts, its batches and what identifies them."""

    device: str
    comm: Comm
    dataset: Dataset
    model: LanguageModel
    learner: Learner
    loader: Batches
    inputs: dict[str, str]
    """Hashes of what was read from outside besides the corpus, by the recipe's keys."""

    @property
    @abstractmethod
    def config(self) -> RunConfig:
        """The trainer's settings."""

    @property
    @abstractmethod
    def val_batches(self) -> Sequence[Batch]:
        """The fixed batches of val that every evaluation is over."""

    @property
    @abstractmethod
    def labelled_batches(self) -> Sequence[LabelledBatch]:
        """Windows of val with the noise that train has, on every rank alike; none where train has none."""

    @abstractmethod
    def dropout_seed(self, step: int) -> int | None:
        """Return the seed of `step`'s dropout masks on this rank; None for a model without dropout."""


Status = Literal["finished", "diverged", "interrupted"]


class Trainer:
    """Train one session and keep its checkpoints. Call `resume` first to go on from one of them, then `run`."""

    def __init__(self, session: TrainingSession, checkpoints: Checkpoints, observers: Sequence[Observer] = ()) -> None:
        self.session = session
        self.checkpoints = checkpoints
        self.recorder = Recorder(observers, session.config.log_every)
        self.progress = Progress()
        self.activation_bytes = 0
        self.wall_seconds = 0.0
        self.val_loss: float | None = None
        self.evaluated_step = -1
        self.message: str | None = None
        self.warnings: list[str] = []
        self.notes: list[str] = []
        """What to say of a resumed run, once it goes on."""

    def run(self, interrupt: Interrupt) -> Status:
        """Train until the budget is spent, a loss is not finite, or a signal arrives."""
        began = time.perf_counter() - self.wall_seconds
        self.session.model.train()
        try:
            if self.progress.step == 0:
                self._begin()
            self._warn(self.notes)
            if self.session.config.compile:
                self.session.model.compile()
            status = self._loop(interrupt)
        except Diverged as error:
            status, kept = "diverged", self.checkpoints.names()
            self.message = f"{error} The last good checkpoint is {kept[-1] if kept else 'none'}."
        self.wall_seconds = time.perf_counter() - began
        return status

    def _loop(self, interrupt: Interrupt) -> Status:
        config, progress = self.session.config, self.progress
        began = time.perf_counter() - self.wall_seconds
        interrupted = progress.step == 0 and self._prepare(interrupt)
        while progress.spent(config.budget) < 1 and not interrupted:
            self._step()
            interrupted = self.session.comm.any(interrupt.received is not None)
            done = progress.spent(config.budget) >= 1
            if progress.step % config.eval_every == 0 or done:
                self._evaluate()
            self.wall_seconds = time.perf_counter() - began
            if progress.step % config.checkpoint_every == 0 or done or interrupted:
                self._checkpoint()
        if interrupted and progress.spent(config.budget) < 1:
            return "interrupted"
        if self.evaluated_step != progress.step:  # resumed with nothing left of the budget
            self._evaluate()
            self._checkpoint()
        return "finished"

    def _begin(self) -> None:
        """Evaluate the untrained model, measure what the rule holds and write the first checkpoint."""
        session = self.session
        self._evaluate()
        batch = session.loader.next_batch()
        session.loader.load_state({"position": 0})
        self.activation_bytes = session.learner.held_bytes(batch)
        self._checkpoint()

    def _prepare(self, interrupt: Interrupt) -> bool:
        """Do what the learner does before its first step, with checkpoints; return whether a signal has stopped it."""
        learner, more, interrupted = self.session.learner, True, False
        while more and not interrupted:
            began = self._now()
            more = learner.prepare()
            self.progress.seconds += self._agreed(self._now() - began)
            if more:  # else the first step comes now, and a signal is seen behind it
                interrupted = self.session.comm.any(interrupt.received is not None)
                if interrupted or learner.prepared_whole:
                    self._checkpoint()
        return interrupted

    def _step(self) -> None:
        session, config = self.session, self.session.config
        number = self.progress.step + 1
        scale = lr_scale(config, self.progress)
        began = self._now()
        report = session.learner.step(
            session.loader.next_batch(),
            lr_scale=scale,
            probe=config.probe_every is not None and number % config.probe_every == 0,
            dropout_seed=session.dropout_seed(number),
        )
        self.progress.seconds += self._agreed(self._now() - began - report.probe_seconds)
        self.progress.advance(report.cost, session.comm.world_size)
        self.recorder.add(self.progress.as_dict(), session.learner.lr * scale, report)

    def _now(self) -> float:
        if self.session.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _agreed(self, seconds: float) -> float:
        """The mean over the ranks where seconds decide when to stop and how fast to learn, else this rank's own."""
        if self.session.config.budget.unit != "seconds":
            return seconds
        total = self.session.comm.sum(torch.tensor(seconds, dtype=torch.float64))
        return float(total) / self.session.comm.world_size

    def _evaluate(self) -> None:
        self.recorder.flush()
        self.session.learner.settle()
        diagnosis = self._diagnose()  # first, for it may say why there is no loss
        loss = evaluate(self.session.model, self.session.val_batches, self.session.comm)
        if not math.isfinite(loss):
            self._warn(diagnosis.warnings)
            said = [f"{text[0].upper()}{text[1:]}." for text in diagnosis.warnings]
            if self.progress.step or not said:  # the general remedies are for training
                said.append(REMEDIES)
            raise Diverged(f"The validation loss became {loss} at step {self.progress.step}. {' '.join(said)}")
        rate = self.session.dataset.splits["val"].bytes_per_token
        self.val_loss, self.evaluated_step = loss, self.progress.step
        row = {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, rate)}
        measured = {key: finite(value) for key, value in diagnosis.values.items()}
        self.recorder.tell({"kind": "eval", **self.progress.as_dict(), **row, **measured})
        self._warn(diagnosis.warnings)

    def _warn(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.warnings.append(f"step {self.progress.step}: {text}")
            self.recorder.tell({"kind": "warning", "step": self.progress.step, "text": text})

    def _diagnose(self) -> Diagnosis:
        """What the learner says of held-out noise, and the model of itself on the first batch of val.

        Only rank 0 asks the model.
        """
        examined = self.session.learner.examine(self.session.labelled_batches)
        batches = self.session.val_batches
        if self.session.comm.rank or not len(batches):
            return examined
        found = self.session.model.diagnose(batches[0].to(self.session.device).inputs)
        return Diagnosis(examined.values | found.values, examined.warnings + found.warnings)

    def _checkpoint(self) -> None:
        self.recorder.flush()
        session = self.session
        session.learner.settle()
        learned = session.learner.state()
        if not all(bool(tensor.isfinite().all()) for tensor in session.model.state_dict().values()):
            raise Diverged(f"The weights are no longer finite after step {self.progress.step}. {REMEDIES}")
        if session.comm.rank == 0:
            values = {
                "progress": self.progress.as_dict(),
                "activation_bytes": self.activation_bytes,
                "wall_seconds": self.wall_seconds,
                "val_loss": self.val_loss,
                "evaluated_step": self.evaluated_step,
                "warnings": self.warnings,
                "corpus_sha256": session.dataset.corpus_sha256,
                "inputs": session.inputs,
                "threads": torch.get_num_threads(),
                "ranks": session.comm.world_size,
                "budget": session.config.budget.model_dump(),
            }
            state = {"learner": learned, "loader": session.loader.state()}
            model = dict(session.model.state_dict())
            self.checkpoints.save(self.progress.step, model, state, values)
        session.comm.barrier()

    def resume(self, name: str | None = None) -> None:
        """Go on from the checkpoint `name`, by default the latest.

        Raises `CheckpointError` for a damaged checkpoint, another model's, or another corpus, tokenizer or the like.
        """
        model, state, values = self.checkpoints.load(name)
        self._note_changes(values)
        require_run(self.checkpoints.run, state, values)
        self._require("corpus", values["corpus_sha256"], self.session.dataset.corpus_sha256)
        for key, sha256 in values.get("inputs", {}).items():  # checkpoints had none at first
            self._require(key, sha256, self.session.inputs.get(key, sha256))
        restore(dict(self.session.model.state_dict()), model, "weight")
        device = self.session.device
        with restoring(self.checkpoints.run):
            self.session.learner.load_state(map_tensors(state["learner"], lambda tensor: tensor.to(device)))
            self.session.loader.load_state(state["loader"])
            self.progress = Progress(**values["progress"])
        self.activation_bytes = values["activation_bytes"]
        self.wall_seconds = values["wall_seconds"]
        self.val_loss, self.evaluated_step = values["val_loss"], values["evaluated_step"]
        self.warnings = list(values["warnings"])

    def _note_changes(self, values: Mapping[str, Any]) -> None:
        """Go on with as many CPU threads as before, and note what makes the run another than if it had not stopped."""
        config, progress = self.session.config, Progress(**values["progress"])
        threads, ranks = values.get("threads"), values.get("ranks")  # checkpoints had neither at first
        if threads is not None and threads != torch.get_num_threads():
            if config.threads is None:
                torch.set_num_threads(threads)
            else:
                self.notes.append(
                    f"run.threads is {config.threads} and the run began with {threads}: its bits will differ from an "
                    "uninterrupted run's"
                )
        if ranks is not None and ranks != self.session.comm.world_size:
            self.notes.append(
                f"the run began on {ranks} ranks and goes on on {self.session.comm.world_size}: its bits will "
                "differ from an uninterrupted run's"
            )
        before = values.get("budget")
        if before is not None and before != config.budget.model_dump():
            unit, limit = config.budget.unit, config.budget.limit
            if progress.spent(config.budget) > 1:
                self.notes.append(
                    f"the budget of {limit:g} {unit} is spent already, at step {progress.step}: nothing more is trained"
                )
            elif config.schedule == "cosine" and progress.spent(config.budget) < 1:
                old = lr_scale(config.model_copy(update={"budget": Budget(**before)}), progress)
                now = lr_scale(config, progress)
                self.notes.append(
                    f"the budget is {limit:g} {unit} now, so the cosine of the learning rate is laid anew over all of "
                    f"it: the next step is at {now:.3f} of the full rate, not at {old:.3f}; run.schedule constant has "
                    "no such jump"
                )

    def _require(self, what: str, there: str, here: str) -> None:
        """Refuse to go on with another corpus or the like than the run began with."""
        if there != here:
            raise CheckpointError(
                f"{self.checkpoints.run} was trained with another {what} (fingerprint {there[:12]}…, the recipe's has "
                f"{here[:12]}…): give the original {what}, or another --out"
            )
