"""What ranks exchange: two real gloo processes, and the lone one that has nobody to talk to."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heterodox.core.comm import Solo, connect, local_rank
from heterodox.core.errors import RecipeError

WORKER = Path(__file__).with_name("comm_worker.py")


def test_two_ranks_exchange_what_they_should_and_miss_each_other():
    """Two ranks of the worker, started as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(WORKER)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 7], said
    assert said == [("", "")] * 2


def test_alone_everything_is_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    comm = connect("cpu")
    assert isinstance(comm, Solo)
    tensor = torch.arange(3.0)
    with comm:
        comm.mean_([tensor])
        comm.barrier()
        assert torch.equal(tensor, torch.arange(3.0))
        assert torch.equal(comm.sum(tensor), tensor)
        assert torch.equal(comm.gather(tensor), tensor)
        assert comm.any(True)
        assert not comm.any(False)
    assert (comm.rank, comm.world_size) == (0, 1)


def test_several_processes_without_torchrun_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="start them with torchrun"):
        connect("cpu")


def test_the_local_rank_comes_from_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_rank() == 3
    monkeypatch.delenv("LOCAL_RANK")
    assert local_rank() == 0
