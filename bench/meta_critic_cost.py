"""What MCL-DSUP costs against backprop and checkpointed backprop: FLOPs per token, bytes held, meta-parameters, time.

python bench/meta_critic_cost.py [--steps N] data.path=FILE [KEY=VALUE ...]

Overrides apply to recipes/meta_critic/meta_critic.yaml. With --steps also the median time of so many signals.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodox.app.recipe import load_recipe
from heterodox.app.session import open_session
from heterodox.core.comm import Solo
from heterodox.core.memory import activation_bytes
from heterodox.core.protocols import LanguageModel
from heterodox.data import Loader
from heterodox.model import GPT

RECIPE = Path(__file__).parents[1] / "recipes" / "meta_critic" / "meta_critic.yaml"
ALONE = "credit.joint_every=null"
VARIANTS: dict[str, list[str]] = {
    "backprop": ["credit=backprop"],
    "backprop, checkpointed blocks": ["credit=backprop"],
    "meta_critic, all stages": [ALONE],
    "all stages, one by one": [ALONE, "credit.suffix=separate"],
    "2 stages a step": [ALONE, "credit.layers_per_step=2"],
    "1 stage a step": [ALONE, "credit.layers_per_step=1"],
    "a step without a meta-step": [ALONE, "credit.objective=frozen", "credit.hypothesis=weights", "credit.step=1.0"],
    "shared critics": [ALONE, "credit.shared=true"],
    "hypothesis: weights": [ALONE, "credit.hypothesis=weights"],
    "transport: none": [ALONE, "credit.transport=none"],
}


class _Recomputed(torch.autograd.Function):
    """A block whose input alone is kept. On the way back it runs again, in sight of the hooks that count saved tensors.

    (Those of `torch.utils.checkpoint` would hide what it saves then.)
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        return None, *torch.autograd.grad(y, [x, *ctx.parameters], grads)


def recompute_blocks(model: LanguageModel) -> None:
    """Keep each block's input alone, and run the block again on the way back."""
    assert isinstance(model, GPT)
    for block in model.blocks:
        block.forward = _recomputed(block.forward, list(block.parameters()))


def _recomputed(run: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: _Recomputed.apply(run, x, *parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="signals to time")
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    given = parser.parse_args()
    print(f"{'':42}{'kFLOP/token':>12}{'held, MB':>10}{'meta-params':>13}{'ms/signal':>11}")
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
