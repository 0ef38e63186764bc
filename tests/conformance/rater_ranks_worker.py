"""One of two ranks: meta-training with an inner model each, and every filter, beside one rank alone on the whole.

Run by test_rater_ranks.py through torchrun. Rank 0 prints a line of JSON for each case: its name, how far any number in
weights and state came apart, and how far a weight has moved.
"""

import json

import torch

from heterodox.app.recipe import Recipe
from heterodox.app.session import open_session
from heterodox.core.comm import Comm, Solo, connect
from heterodox.core.state import split
from tests.tiny_rater import LEARNER, rater_recipe, user_recipe

TRAIN = {key: value for key, value in LEARNER.items() if key != "name"} | {"rounds": 1}
EXACT = {"precision": "float64"}
CASES: dict[str, Recipe] = {
    "learner": rater_recipe(run=EXACT),
    "filter": user_recipe({"train": TRAIN, "keep": 0.5}),
    "reweight": user_recipe({"train": TRAIN, "mode": "reweight"}),
    "random": user_recipe({"name": "random", "keep": 0.5}),
    "perplexity": user_recipe({"name": "perplexity", "keep": 0.5, "skip": 0.1}),
}


def furthest_apart(recipe: Recipe, comm: Comm, steps: int) -> tuple[float, float]:
    together, alone = (open_session(recipe, ranks, "cpu") for ranks in (comm, Solo()))
    initial = [weight.clone() for weight in alone.model.state_dict().values()]
    worst = 0.0
    for _ in range(steps):
        halves = together.learner.step(together.loader.next_batch())
        whole = alone.learner.step(alone.loader.next_batch())
        assert 2 * halves.cost.tokens == whole.cost.tokens
        assert 2 * halves.cost.meta_tokens == whole.cost.meta_tokens
        assert 2 * halves.cost.flops == whole.cost.flops
        pairs = [(halves.loss, whole.loss), (halves.grad_norm, whole.grad_norm)]
        trees = []
        for session in (together, alone):
            session.learner.settle()
            trees.append(split({"model": dict(session.model.state_dict()), "learner": session.learner.state()}))
        (mine, here), (other, there) = trees
        assert here == there
        pairs += [(mine[name], other[name]) for name in other]
        worst = max(worst, *(float((a.double() - b.double()).abs().max()) for a, b in pairs))
    moved = max(
        float((after - before).abs().max())
        for after, before in zip(alone.model.state_dict().values(), initial, strict=True)
    )
    return worst, moved


def main() -> None:
    torch.set_num_threads(1)
    with connect("cpu") as comm:
        for name, recipe in CASES.items():
            recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=EXACT)})
            apart, moved = furthest_apart(recipe, comm, 7 if name == "learner" else 2)
            apart = float(comm.gather(torch.tensor([apart], dtype=torch.float64)).max())
            if comm.rank == 0:
                print(json.dumps([name, apart, moved]), flush=True)


if __name__ == "__main__":
    main()
