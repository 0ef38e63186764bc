"""Several processes that train one model: the only user of `torch.distributed`.

There is no DistributedDataParallel wrapper: rules compute their own signals, and what must agree between ranks is
averaged here, in one flat buffer per dtype.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from heterodox.core.errors import HeterodoxError, RecipeError


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
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
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
