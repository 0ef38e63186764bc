"""One of two ranks that try every method of `Comm`; the second then leaves, with exit code 7."""

import sys

import torch
from torch import Tensor

from heterodox.core.comm import Comm, Group, connect
from heterodox.core.errors import HeterodoxError


def try_mean(comm: Comm) -> None:
    own = float(comm.rank)  # the mean over the two ranks is 0.5
    tensors: list[Tensor] = [
        torch.full((2, 3), own),
        torch.tensor(own, dtype=torch.float64),
        torch.full((4, 2), own, dtype=torch.float64).T,
        torch.full((5,), own),
        torch.full((2,), own, dtype=torch.bfloat16),
        torch.empty(0),
    ]
    dtypes, places = [t.dtype for t in tensors], [t.data_ptr() for t in tensors]
    comm.mean_(tensors)
    assert [t.dtype for t in tensors] == dtypes
    assert [t.data_ptr() for t in tensors] == places
    assert all(bool((t == 0.5).all()) for t in tensors)
    assert [t.shape for t in tensors] == [(2, 3), (), (2, 4), (5,), (2,), (0,)]
    comm.mean_([])
    exact = torch.tensor([1.0, 1e-17, -1.0], dtype=torch.float64) * (1 + comm.rank)
    comm.mean_([exact])
    assert torch.equal(exact, torch.tensor([1.5, 1.5e-17, -1.5], dtype=torch.float64))


def try_sum_and_gather(comm: Comm) -> None:
    mine = torch.tensor([comm.rank, 10], dtype=torch.int64)
    assert comm.sum(mine).tolist() == [1, 20]
    assert mine.tolist() == [comm.rank, 10]
    rows = torch.full((2, 3), comm.rank).T.contiguous().T  # not contiguous
    assert comm.gather(rows).tolist() == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]


def try_any(comm: Comm) -> None:
    assert comm.any(comm.rank == 1)
    assert comm.any(True)
    assert not comm.any(False)


def try_losing_a_rank(comm: Comm) -> None:
    if comm.rank == 1:
        sys.exit(7)  # leaves without a word
    message = ""
    try:
        comm.barrier()
        comm.sum(torch.ones(3))
    except HeterodoxError as error:
        message = str(error)
    assert message.startswith("rank 0 lost the other ranks: ")
    assert "\n" not in message


def main() -> None:
    with connect("cpu") as comm:
        assert isinstance(comm, Group)
        assert comm.world_size == 2
        comm.barrier()
        try_mean(comm)
        try_sum_and_gather(comm)
        try_any(comm)
        try_losing_a_rank(comm)


main()
