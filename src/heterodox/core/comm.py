"""Several processes that train one model: the only user of `torch.distributed`.

There is no DistributedDataParallel wrapper: rules compute their own signals, and what must agree between ranks is
averaged here, in one flat buffer per dtype.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from heterodox.core.errors import HeterodoxError, RecipeError

Result = TypeVar("Result")


class Comm(AbstractContextManager["Comm"], ABC):
    """What the ranks of a run can ask of each other. Every method must be called by all ranks alike."""

    rank: int = 0
    world_size: int = 1

    @abstractmethod
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its mean over the ranks."""

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of equal shape, concatenated along the first dimension in rank order."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    def texts(self, text: str) -> list[str]:
        """Return every rank's `text`, the first kilobyte of each, in rank order."""
        data = text.encode()[:1024]
        padded = torch.zeros(1024, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
        rows = self.gather(padded).view(-1, 1024)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]

    def together(self, prepare: Callable[[], Result]) -> Result:
        """Return what `prepare` gives on this rank, which may raise, but must not talk to the others.

        Where it raises a `HeterodoxError` on some rank, all ranks raise that rank's.
        """
        result: Result | None = None
        problem: HeterodoxError | None = None
        try:
            result = prepare()
        except HeterodoxError as error:
            problem = error
        said = self.texts("" if problem is None else str(problem) or type(problem).__name__)
        failed = [(rank, text) for rank, text in enumerate(said) if text]
        if problem is not None:
            raise problem
        if failed:
            raise HeterodoxError(f"rank {failed[0][0]} cannot go on: {failed[0][1]}")
        return result  # pyrefly: ignore[bad-return]

    def require_agreement(self, what: str, own: str) -> None:
        """Raise `RecipeError` on all ranks alike where `own`, a fingerprint, is not the same on all."""
        found = self.texts(own)
        other = next((rank for rank, text in enumerate(found) if text != found[0]), None)
        if other is not None:
            raise RecipeError(
                f"rank {other} has another {what} than rank 0, so they cannot train one model; give every rank the same"
            )

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return bool(self.sum(torch.tensor(float(flag), dtype=torch.float64)) > 0)

    def __enter__(self) -> "Comm":
        return self


class Solo(Comm):
    """One process: nothing to exchange."""

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Group(Comm):
    """The processes that `torchrun` started: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, device: str) -> None:
        self.device = device
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"WORLD_SIZE asks for several processes, start them with torchrun: {reason}") from None
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        for group in _by_dtype(tensors):
            flat = torch.cat([t.reshape(-1) for t in group])
            with _in_touch():
                dist.all_reduce(flat)
            flat /= self.world_size
            pieces = flat.split([t.numel() for t in group])
            torch._foreach_copy_(list(group), [p.view_as(t) for p, t in zip(pieces, group, strict=True)])

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        with _in_touch():
            dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with _in_touch():
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        self.sum(torch.zeros((), device=self.device))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        dist.destroy_process_group()


def connect(device: str) -> Comm:
    """The process group that `torchrun` describes in the environment, or `Solo`."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise RecipeError(f"{name} is {os.environ[name]!r}, expected a number, as torchrun sets it")
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Solo()
    if not dist.is_available():
        raise RecipeError("this PyTorch has no torch.distributed; run one process instead of torchrun")
    return Group(device)


def local_rank() -> int:
    """This process's index on its machine, as `torchrun` tells it; 0 alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _in_touch() -> Iterator[None]:
    """Within the context, a lost connection is an error of ours: the rank that failed first says why."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise HeterodoxError(f"rank {dist.get_rank()} lost the other ranks: {reason}") from None


def _by_dtype(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups.values()
