"""Checkpoints: whole or not there, on a full disk too; a damaged one is named and the previous one works."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from heterodox.app.session import open_session
from heterodox.core.errors import CheckpointError
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.metrics import MetricsFile
from tests.command import answer_of, heterodox, launch, recipe_file, refused
from tests.saved import assert_same_bits, tensors, timeless


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_file(tmp_path_factory.mktemp("recipe"), run={"keep_checkpoints": 3})


@pytest.fixture(scope="module")
def whole(recipe):
    """A run that nothing disturbed, with checkpoints at steps 10, 20 and 30."""
    out = recipe.parent / "whole"
    assert heterodox("train", recipe, "--out", out, "--quiet").code == 0
    return out


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def save(checkpoints: Checkpoints, step: int) -> Path:
    model = {"w": torch.full((300,), float(step))}
    return checkpoints.save(step, model, {"learner": {"m": torch.ones(2), "t": step}}, {"step": step})


def test_what_goes_in_comes_out_and_only_the_last_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (0, 10, 20):
        save(checkpoints, step)
    assert checkpoints.names() == ["step-00000010", "step-00000020"]
    model, state, values = checkpoints.load()
    assert torch.equal(model["w"], torch.full((300,), 20.0))
    assert torch.equal(state["learner"]["m"], torch.ones(2))
    assert (state["learner"]["t"], values["step"]) == (20, 20)
    assert checkpoints.load("step-00000010")[2]["step"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == checkpoints.names()


def test_going_back_replaces_what_came_later(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=4)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    (tmp_path / "step-of-mine").mkdir()
    checkpoints.drop_after(20)
    assert checkpoints.names() == ["step-00000010", "step-00000020"]
    assert (tmp_path / "step-of-mine").is_dir()
    (tmp_path / "step-00000020" / "state.json").write_text("damaged")
    save(checkpoints, 20)
    assert checkpoints.load()[2]["step"] == 20


def test_going_back_leaves_no_hole_in_the_metrics(run, recipe, monkeypatch):
    """A run that went back and was killed before its first checkpoint is where it went back to."""
    with monkeypatch.context() as patch:
        patch.setattr("heterodox.training.loop.Trainer.run", lambda *_: sys.exit(9))
        back = ("train", recipe, "--out", run, "--resume", "--checkpoint", "step-00000010", "--quiet")
        assert "sys.exit(9)" in heterodox(*back).err
    assert Checkpoints(run / "checkpoints").names() == ["step-00000010"]
    assert max(row["step"] for row in timeless(run)) == 10


def test_a_run_that_another_process_has_just_ended_is_left_alone(run, recipe, whole, monkeypatch):
    """It ended between the first look into the folder and the lock."""
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    with monkeypatch.context() as patch:

        def opening(*arguments):
            shutil.copytree(whole / "checkpoints", run / "checkpoints")
            return open_session(*arguments)

        patch.setattr("heterodox.app.train.open_session", opening)
        answer = heterodox("train", recipe, "--out", run, "--resume")
    refused(answer, "another process has just trained in")
    assert_same_bits(tensors(run), tensors(whole))


def test_leftovers_of_a_crash_are_cleared(tmp_path):
    (tmp_path / ".writing-step-00000005").mkdir()
    (tmp_path / ".dropped-step-00000001").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.names() == []
    save(checkpoints, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("model.safetensors", "state.safetensors", "state.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_offered(file, damage, run, recipe):
    newest = run / "checkpoints" / "step-00000030"
    damage(newest / file)
    for command in (["train", recipe, "--resume", "--out"], ["generate"], ["probe"], ["export"]):
        answer = heterodox(*command, run)
        refused(
            answer, f"checkpoint {newest} is damaged", "go back to the previous one with --checkpoint step-00000020"
        )
    assert heterodox("generate", run, "--prompt", "a", "--tokens", 1, "--checkpoint", "step-00000020").code == 0


def test_the_previous_one_works(run, whole, recipe):
    for file, damage in zip(FILES, (truncate, flip, Path.unlink), strict=True):
        damage(run / "checkpoints" / "step-00000030" / file)
    answer = heterodox("train", recipe, "--out", run, "--resume", "--checkpoint", "step-00000020", "--quiet")
    assert answer.code == 0, answer
    assert_same_bits(tensors(run), tensors(whole))
    assert timeless(run) == timeless(whole)


def test_the_oldest_one_offers_none(run, recipe):
    for newer in ("step-00000020", "step-00000030"):
        shutil.rmtree(run / "checkpoints" / newer)
    truncate(run / "checkpoints" / "step-00000010" / "state.json")
    answer = heterodox("train", recipe, "--out", run, "--resume")
    refused(answer, "is damaged")
    assert "go back" not in answer.err


STAGES = [
    ("pathlib.Path.mkdir", 1, "the folder"),
    ("heterodox.training.checkpoint.save_file", 1, "the weights"),
    ("heterodox.training.checkpoint.save_file", 2, "the state"),
    ("heterodox.core.files.sync", 1, "syncing the weights"),
    ("pathlib.Path.write_text", 1, "the JSON"),
    ("heterodox.core.files.sync", 3, "syncing the JSON"),
    ("pathlib.Path.rename", 1, "the name"),
]


@pytest.mark.parametrize(("target", "call", "stage"), STAGES)
def test_a_disk_that_fills_up_at_any_stage_leaves_the_previous_one(target, call, stage, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    module, _, name = target.rpartition(".")
    owner = Path if module == "pathlib.Path" else __import__(module, fromlist=[name])
    real, calls = getattr(owner, name), 0

    def full(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(
        CheckpointError, match=r"cannot write checkpoint .*00020: .*No space.*; step-00000010 is intact"
    ):
        save(checkpoints, 20)
    monkeypatch.undo()
    assert calls >= call
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert checkpoints.load()[2]["step"] == 10
    save(checkpoints, 20)
    assert checkpoints.load()[2]["step"] == 20


LIMITED = """
import resource, signal, sys
from heterodox.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
main()
"""


def test_a_full_disk_for_real(run, whole, recipe):
    """No file may grow beyond a limit, so that the weights fit, and the moments of AdamW do not."""
    limit = (run / "checkpoints" / "step-00000020" / "state.safetensors").stat().st_size - 1000
    back = ("train", recipe, "--out", run, "--resume", "--checkpoint", "step-00000010", "--quiet")
    answer = answer_of(launch(*back, python=("-c", LIMITED.format(limit=limit))))
    refused(answer, "cannot write checkpoint", "step-00000020: ", "is intact")
    assert heterodox(*back).code == 0
    assert_same_bits(tensors(run), tensors(whole))
    assert timeless(run) == timeless(whole)


def test_metrics_that_cannot_be_written(run, whole, recipe, monkeypatch):
    class Filling(MetricsFile):
        """Metrics on a disk that is full from step 15 on."""

        def row(self, row):
            if row["step"] >= 15:
                self._file.close()
                self._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  (closed with the metrics)
            super().row(row)

    back = ("train", recipe, "--out", run, "--resume", "--checkpoint", "step-00000010", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr("heterodox.app.train.MetricsFile", Filling)
        refused(heterodox(*back), f"cannot write {run / 'metrics.jsonl'}: No space left on device")
    assert heterodox(*back).code == 0
    assert_same_bits(tensors(run), tensors(whole))
    assert timeless(run) == timeless(whole)
