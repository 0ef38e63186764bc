"""Ranks that differ stop before anything is written, each with a line that says what differs."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heterodox.app.recipe import Recipe
from heterodox.app.session import open_session
from heterodox.core.comm import Comm, Solo
from heterodox.core.errors import CorpusError, HeterodoxError, RecipeError
from tests.command import answer_of, recipe_file
from tests.conformance.test_ranks import torchrun
from tests.tiny import tiny_recipe


class ThreadRank(Solo):
    """One of two ranks that are threads of this process: what `gather` needs, and no more."""

    def __init__(self, rank: int, barrier: threading.Barrier, shared: dict[int, Tensor]) -> None:
        self.rank, self.world_size, self._barrier, self._shared = rank, 2, barrier, shared

    def gather(self, tensor: Tensor) -> Tensor:
        self._shared[self.rank] = tensor
        self._barrier.wait(timeout=60)
        found = torch.cat([self._shared[rank] for rank in range(2)])
        self._barrier.wait(timeout=60)
        return found


def errors_of(work: Callable[[Comm], object]) -> list[str | None]:
    """What each of two ranks says of `work`; None where it did not complain."""
    barrier, shared, said = threading.Barrier(2), {}, [None, None]

    def run(rank: int) -> None:
        try:
            work(ThreadRank(rank, barrier, shared))
        except HeterodoxError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return said


def test_alike_ranks_agree():
    assert errors_of(lambda comm: comm.require_agreement("corpus", "abc")) == [None, None]
    assert errors_of(lambda comm: open_session(tiny_recipe(), comm, "cpu")) == [None, None]
    Solo().require_agreement("corpus", "abc")
    assert Solo().together(lambda: 3) == 3


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"update": {"lr": 0.5}}, "another recipe"),
        ({"seed": 1}, "another recipe"),
        ({"model": {"width": 8}}, "another recipe"),
    ],
)
def test_another_recipe_is_named_by_both(changed, what):
    recipes: list[Recipe] = [tiny_recipe(), tiny_recipe(**changed)]
    said = errors_of(lambda comm: open_session(recipes[comm.rank], comm, "cpu"))
    assert said[0] == said[1]
    assert "rank 1 has another recipe than rank 0" in said[0]


def test_another_text_and_a_missing_one_are_named_by_both(tmp_path):
    for name, text in (("a.txt", "ab" * 4000), ("b.txt", "ba" * 4000)):
        (tmp_path / name).write_text(text)

    def said(other: str) -> list[str | None]:
        paths = [tmp_path / "a.txt", tmp_path / other]
        recipes = [tiny_recipe(data={"corpus": {"name": "file", "path": str(path)}}) for path in paths]
        return errors_of(lambda comm: open_session(recipes[comm.rank], comm, "cpu"))

    assert all("rank 1 has another corpus (data.corpus) than rank 0" in text for text in said("b.txt"))
    first, second = said("nowhere.txt")
    assert first == f"rank 1 cannot go on: {second}"
    assert "there is no file or folder" in second


def test_other_weights_are_noticed():
    def work(comm: Comm) -> None:
        comm.require_agreement("set of initial weights", f"weights of rank {comm.rank}")

    with pytest.raises(RecipeError):
        raise RecipeError(errors_of(work)[0])
    assert all("another set of initial weights" in text for text in errors_of(work))


def test_an_error_of_ones_own_keeps_its_kind():
    def work(comm: Comm) -> None:
        def prepare() -> int:
            if comm.rank == 0:
                raise CorpusError("nothing here")
            return 1

        comm.together(prepare)

    assert errors_of(work) == ["nothing here", "rank 0 cannot go on: nothing here"]


def test_two_processes_stop_and_write_nothing(tmp_path):
    """Rank 1 has another learning rate."""
    recipe, out = recipe_file(tmp_path), tmp_path / "run"
    worker = Path(__file__).with_name("disagreeing_worker.py")
    answer = answer_of(torchrun(worker, "train", recipe, "--out", out, "--", "update.lr=0.5"), timeout=120)
    assert answer.code != 0
    assert answer.err.count("heterodox: rank 1 has another recipe than rank 0") == 2
    assert not out.exists()
