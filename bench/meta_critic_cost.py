"""What MCL-DSUP costs against backprop and checkpointed backprop: FLOPs per token, bytes held, meta-parameters, time.

python bench/meta_critic_cost.py [--steps N] data.path=FILE [KEY=VALUE ...]

Overrides apply to recipes/meta_critic/meta_critic.yaml. With --steps also the median time of so many signals.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from heterodox.core.comm import Solo
from heterodox.core.protocols import LanguageModel
from heterodox.data import Loader
from heterodox.model import GPT
from heterodox.probe.memory import activation_bytes
from heterodox.recipe import load_recipe
from heterodox.run.session import open_session

RECIPE = Path(__file__).parents[1] / "recipes" / "meta_critic" / "meta_critic.yaml"
ALONE = "credit.joint_every=null"
VARIANTS: dict[str, list[str]] = {
    "backprop": ["credit=backprop"],
    "backprop, checkpointed blocks": ["credit=backprop"],
    "meta_critic, all stages": [ALONE],
    "all stages, one by one": [ALONE, "credit.suffix=separate"],
    "2 stages a step": [ALONE, "credit.layers_per_step=2"],
    "1 stage a step": [ALONE, "credit.layers_per_step=1"],
    "a step without a meta-step": [ALONE, "credit.objective=frozen", "credit.hypothesis=weights"],
    "shared critics": [ALONE, "credit.shared=true"],
    "hypothesis: weights": [ALONE, "credit.hypothesis=weights"],
    "transport: none": [ALONE, "credit.transport=none"],
}


def recompute_blocks(model: LanguageModel) -> None:
    """Keep each block's input alone, and run the block again on the way back."""
    assert isinstance(model, GPT)
    for block in model.blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="signals to time")
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    given = parser.parse_args()
    print(f"{'':42}{'kFLOP/token':>12}{'held, MB':>10}{'meta-params':>13}{'ms/signal':>11}")
    plain = 0
    for name, overrides in VARIANTS.items():
        recipe = load_recipe(RECIPE, [*given.overrides, *overrides])
        session = open_session(recipe, Solo(), "cpu")
        if "checkpointed" in name:
            recompute_blocks(session.model)
        learner, loader = session.learner, session.loader
        assert isinstance(loader, Loader)
        batch = loader.next_batch()
        arguments = (session.model, batch, learner.rating.weights(batch), learner.objective)
        held = activation_bytes(*arguments, learner.credit)
        plain = plain or held
        if "checkpointed" in name:  # what is kept, and one block's graph at a time while it is run again
            held += (plain - held) // recipe.model.layers
        cost = learner.credit.signal(*arguments).cost
        again = session.model.forward_flops(*batch.inputs.shape)
        flops = cost.flops + ("checkpointed" in name) * (again.total - again.head)
        times = []
        for _ in range(given.steps):
            began = time.perf_counter()
            learner.credit.signal(*arguments)
            times.append(1e3 * (time.perf_counter() - began))
        proposals = getattr(learner.credit, "proposals", None)
        size = sum(p.numel() for p in proposals.critics.parameters()) if proposals else 0
        spent = f"{statistics.median(times):.0f}" if times else "–"
        print(f"{name:42}{flops / batch.num_tokens / 1e3:12,.0f}{held / 1e6:10.1f}{size:13,}{spent:>11}")


if __name__ == "__main__":
    main()
