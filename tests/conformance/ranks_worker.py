"""One of two ranks: every pair of rule and update on half batches, beside itself alone on whole ones.

Run by test_ranks.py through torchrun. Rank 0 prints JSON: a line about budgets of seconds, then one per pair.
"""

import json
import sys
import time
from pathlib import Path

import torch

from heterodox.app.folder import RunFolder
from heterodox.app.session import open_session
from heterodox.core.comm import Comm, Solo, connect
from heterodox.core.state import split
from heterodox.training.interrupt import Interrupt
from heterodox.training.loop import Trainer
from tests.conformance.combinations import RESUMING_PAIRS, recipe_of

STEPS = 20
REPEATING = {
    "feedback_alignment grape", "feedback_alignment grape jacobian", "meta_critic low_rank", "meta_critic source",
}  # fmt: skip
"""What does not grow with the batch each rank does for itself: GrAPE's probes, critics' one answer for all tokens."""


def furthest_apart(credit: str, update: str, comm: Comm) -> tuple[float, float]:
    """The largest difference of any number in weights and state after any step, and how far a weight has moved."""
    recipe = recipe_of(credit, update, run={"precision": "float64", "warmup_steps": 3})
    together, alone = (open_session(recipe, ranks, "cpu") for ranks in (comm, Solo()))
    initial = {name: weight.clone() for name, weight in alone.model.state_dict().items()}
    worst = 0.0
    for step in range(STEPS):
        scale = min(1.0, (step + 1) / 3)
        halves = together.learner.step(together.loader.next_batch(), lr_scale=scale)
        whole = alone.learner.step(alone.loader.next_batch(), lr_scale=scale)
        assert 2 * halves.cost.tokens == whole.cost.tokens
        twice = 2 * halves.cost.flops - whole.cost.flops
        assert twice > 0 if credit in REPEATING else twice == 0
        pairs = [(halves.loss, whole.loss), (halves.grad_norm, whole.grad_norm)]
        mine, other = (
            split({"model": dict(session.model.state_dict()), "learner": session.learner.state()})[0]
            for session in (together, alone)
        )
        assert mine.keys() == other.keys()
        pairs += [(mine[name], other[name]) for name in mine]
        worst = max(worst, *(float((a.double() - b.double()).abs().max()) for a, b in pairs))
    moved = max(float((weight - initial[name]).abs().max()) for name, weight in alone.model.state_dict().items())
    return worst, moved


def stop_together(comm: Comm, folder: Path) -> tuple[int, float]:
    """How far two ranks whose clocks run at different speeds come apart under a budget of seconds: steps, weights."""
    run = {"precision": "float64", "budget": {"seconds": 0.4}, "checkpoint_every": 1000}
    session = open_session(recipe_of("backprop", "adamw", run=run), comm, "cpu")
    trainer, clock = Trainer(session, RunFolder(folder).checkpoints), time.perf_counter
    time.perf_counter = lambda: (1 + 2 * comm.rank) * clock()
    try:
        assert trainer.run(Interrupt()) == "finished"
    finally:
        time.perf_counter = clock
    steps = comm.gather(torch.tensor([trainer.progress.step]))
    weights = comm.gather(session.model.head.weight.detach()[None])
    return int(steps.max() - steps.min()), float((weights[0] - weights[1]).abs().max())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with connect("cpu") as comm:
        assert comm.world_size == 2
        apart = stop_together(comm, folder)
        if comm.rank == 0:
            print(json.dumps(apart), flush=True)
        for credit, update in RESUMING_PAIRS:
            apart, moved = furthest_apart(credit, update, comm)
            apart = float(comm.gather(torch.tensor([apart], dtype=torch.float64)).max())
            if comm.rank == 0:
                print(json.dumps([credit, update, apart, moved]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
