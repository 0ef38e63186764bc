"""`kill -9` at random moments, each followed by --resume, ends in the weights of a run that nobody disturbed."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from heterodox.app.recipe import Recipe
from heterodox.app.train import train
from heterodox.training.checkpoint import Checkpoints
from tests.command import answer_of, launch, wait_until
from tests.conformance.combinations import RUNNING_PAIRS, recipe_of
from tests.saved import assert_same_bits, tensors, timeless

STEPS = 150
OFTEN = {"budget": {"steps": STEPS}, "checkpoint_every": 3, "log_every": 1, "eval_every": 20}


def slow_enough(credit: str, update: str) -> Recipe:
    """A run that spends most of its time writing checkpoints and metrics."""
    return recipe_of(credit, update, run=OFTEN, model={"dropout": 0.1})


def last_step(out: Path) -> int:
    names = Checkpoints(out / "checkpoints").names()
    return int(names[-1].removeprefix("step-")) if names else -1


def leftovers(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".*.writing"))


def resume(recipe: Path, out: Path) -> subprocess.Popen[str]:
    """A process that trains, to which warnings are errors."""
    strict = ("-W", "error", "-m", "heterodox")
    return launch("train", recipe, "--out", out, "--resume", "--quiet", python=strict)


class Victim:
    """A training process to kill."""

    def __init__(self, recipe: Path, out: Path) -> None:
        self.out = out
        self.process = resume(recipe, out)

    def wait_for(self, step: int) -> None:
        """Until the checkpoint of `step` is there."""
        wait_until(lambda: last_step(self.out) >= step, self.process, interval=0.001)

    def wait_for_writing(self) -> None:
        """Until a checkpoint is being written."""
        wait_until(lambda: bool(leftovers(self.out)), self.process, interval=0.0)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL


def kill_and_resume(recipe: Recipe, folder: Path, kills: int, seed: str) -> None:
    """Assert that a run killed `kills` times, and once more in the middle of a checkpoint, is the undisturbed one."""
    file, out, dice = folder / "recipe.yaml", folder / "killed", random.Random(seed)
    file.write_text(recipe.to_yaml())
    for left in range(kills, 0, -1):
        victim = Victim(file, out)
        begun = last_step(out)
        reach = (STEPS - max(begun, 0)) / (left + 1)
        victim.wait_for(begun + dice.randrange(1, max(2, int(reach))))
        time.sleep(dice.uniform(0, 0.05))
        victim.kill()
    for _ in range(5):  # the moment is short: it may take more than one attempt
        victim = Victim(file, out)
        victim.wait_for(last_step(out) + 1)
        victim.wait_for_writing()
        victim.kill()
        if leftovers(out):
            break
    assert leftovers(out)
    assert last_step(out) < STEPS
    last = answer_of(resume(file, out), timeout=120)
    assert (last.code, last.err) == (0, "")
    assert not leftovers(out)

    whole = train(recipe, folder / "whole").summary
    assert_same_bits(tensors(out), tensors(folder / "whole"))
    assert timeless(out) == timeless(folder / "whole")
    summary = json.loads((out / "summary.json").read_text())
    for key in ("status", "steps", "tokens", "flops", "val_loss", "test_loss", "activation_bytes"):
        assert summary[key] == whole[key], key


def test_three_kills(tmp_path):
    kill_and_resume(slow_enough("feedback_alignment", "adamw"), tmp_path, 2, "three")


@pytest.mark.slow
@pytest.mark.parametrize(("credit", "update"), RUNNING_PAIRS)
def test_ten_kills_for_every_pair(credit, update, tmp_path):
    kill_and_resume(slow_enough(credit, update), tmp_path, 9, f"{credit} {update}")
