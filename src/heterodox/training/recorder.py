"""What a run writes down: rows of metrics, and TensorBoard."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.types import Limit, StepReport

# Turning step reports into metrics rows, and noticing when training has broken down.
#
# Reports wait as tensors until they are flushed, so that logging every tenth step synchronises every tenth step.


Row = dict[str, Any]

REMEDIES = "Likely remedies: a lower update.lr, more run.warmup_steps, a smaller learner.clip."


@runtime_checkable
class Observer(Protocol):
    """Somebody who is told of every metrics row."""

    def row(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Diverged(Exception):
    """A step's loss or gradient norm was not finite, or a metric past its limit; the message is the diagnosis."""


class Recorder:
    """Collects the reports of steps and tells observers of every `log_every`-th one."""

    def __init__(self, observers: Sequence[Observer], log_every: int) -> None:
        self.observers = observers
        self.log_every = log_every
        self._pending: list[tuple[dict[str, Any], float, StepReport]] = []
        self._last_finite: Row | None = None

    def add(self, totals: dict[str, Any], lr: float, report: StepReport) -> None:
        """Note one step: the run's totals behind it, its learning rate and its report."""
        self._pending.append((totals, lr, report))
        if totals["step"] % self.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Write what is pending. Raises `Diverged` at the first step that is not finite or past a limit."""
        pending, self._pending = self._pending, []
        for totals, lr, report in pending:
            row: Row = {"kind": "train", **totals, "lr": lr}
            row |= {"loss": float(report.loss), "grad_norm": float(report.grad_norm)}
            row |= {key: finite(float(value)) for key, value in report.metrics.items()}
            for key, limit in report.limits.items():
                if row[key] is None or row[key] > limit.most:
                    raise Diverged(self._past_limit(row, key, limit))
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise Diverged(self._diagnose(row))
            self._last_finite = row
            if row["step"] % self.log_every == 0 or row["step"] == 1:
                self.tell(row)
            for event in report.events:
                self.tell({"kind": event["kind"], "step": row["step"]} | event)
            if report.alignment is not None:
                self.tell({"kind": "probe", "step": row["step"], "alignment": report.alignment})

    def tell(self, row: Row) -> None:
        for observer in self.observers:
            observer.row(row)

    def _past_limit(self, row: Row, key: str, limit: Limit) -> str:
        value = "no longer finite" if row[key] is None else f"{row[key]:.3g}"
        last = self._last_finite
        before = f"; one step earlier it was {last[key]:.3g}" if last and last.get(key) is not None else ""
        return (
            f"The rule's {key.replace('_', ' ')} is {value} at step {row['step']}, past its limit of {limit.most:g}"
            f"{before}. {limit.meaning}"
        )

    def _diagnose(self, row: Row) -> str:
        what = "gradient norm" if math.isfinite(row["loss"]) else "loss"
        value = row["grad_norm" if math.isfinite(row["loss"]) else "loss"]
        last = self._last_finite
        before = (
            f"one step earlier the loss was {last['loss']:.4g} and the gradient norm {last['grad_norm']:.3g}"
            if last
            else "no step before it is known to be finite"
        )
        return (
            f"The {what} became {value} at step {row['step']}, with a learning rate of {row['lr']:.3g}; {before}. "
            f"{REMEDIES}"
        )


def finite(value: float) -> float | None:
    """What JSON can say of a rule's own measure."""
    return value if math.isfinite(value) else None


# Metrics for TensorBoard, written by tensorboardX beside the JSONL file.
#
# Of tensorboardX only the synchronous half is used: its queue would wait for ever on a disk that is full.


def require_tensorboard() -> None:
    """Raises `RecipeError` where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401  (is it there?)
    except ImportError:
        raise RecipeError("log.tensorboard needs the tensorboard extra: pip install 'heterodox[tensorboard]'") from None


class TensorBoard:
    """Scalars of every row under `folder`; look at them with `tensorboard --logdir`.

    Opened at `step`, it hides what a killed run wrote of later steps.
    """

    def __init__(self, folder: Path, step: int) -> None:
        require_tensorboard()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
        from tensorboardX.summary import scalar

        self.folder = folder
        self._event, self._scalar = Event, scalar
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            self._writer.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror}") from None

    def row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "probe":
            values = {
                f"{measure}/{parameter}": value
                for parameter, measures in row["alignment"].items()
                for measure, value in measures.items()
            }
        else:
            values = {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step")}
        try:
            for tag, value in values.items():
                if isinstance(value, (int, float)):
                    event = self._event(wall_time=time.time(), step=row["step"], summary=self._scalar(tag, value))
                    self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder}: {error.strerror}") from None

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder}: {error.strerror}") from None
