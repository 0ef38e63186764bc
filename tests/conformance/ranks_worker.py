"""One of two ranks: every pair of rule and update on half batches, beside itself alone on whole ones.

Run by test_ranks.py through torchrun. Prints one line of JSON per pair, on rank 0.
"""

import json
import sys

import torch

from heterodox.core.comm import Comm, Solo, connect
from heterodox.core.state import split
from heterodox.run.session import open_session
from tests.conformance.combinations import RUNNING_PAIRS, recipe_of

STEPS = 20


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
        assert 2 * halves.cost.flops == whole.cost.flops
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


def main() -> None:
    torch.set_num_threads(1)
    with connect("cpu") as comm:
        assert comm.world_size == 2
        for credit, update in RUNNING_PAIRS:
            apart, moved = furthest_apart(credit, update, comm)
            apart = float(comm.gather(torch.tensor([apart], dtype=torch.float64)).max())
            if comm.rank == 0:
                print(json.dumps([credit, update, apart, moved]), flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
