"""Step time and held memory of every credit rule over backprop's, each at its default options.

python bench/rules.py
python bench/rules.py --rules direct_feedback --depths 4 8 16 32
"""

import argparse
import statistics

import torch
from timing import alternate, options, random_batches, ratio

from heterodox.app import catalog
from heterodox.app.recipe import load_recipe
from heterodox.app.session import build_learner, build_model
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.memory import activation_bytes
from heterodox.core.types import Batch
from heterodox.learner import Gradient


def main() -> None:
    known = [name for name in catalog.SLOTS["credit"].own if trains_gpt(name)]
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("--rules", nargs="+", default=known, choices=known)
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 8, 16], help="layers at which to weigh memory")
    arguments = parser.parse_args()
    rules = ["backprop", *(name for name in arguments.rules if name != "backprop")]
    torch.set_num_threads(arguments.threads)
    batches = random_batches(arguments.vocab, arguments.batch, arguments.context)

    print(f"torch {torch.__version__}, {arguments.threads} threads; width {arguments.width}, ", end="")
    print(f"context {arguments.context}, batch {arguments.batch}, vocabulary {arguments.vocab}\n")

    steps = {rule: learner(rule, arguments, arguments.layers).step for rule in rules}
    times = alternate(steps, batches, arguments.rounds, arguments.warmup)
    print(f"step time at {arguments.layers} layers, {arguments.rounds} rounds after {arguments.warmup}")
    print(f"{'':24}{'median ms':>12}{'over backprop':>16}")
    for rule in rules:
        quotient = ratio(times[rule], times["backprop"])
        print(f"{rule:24}{statistics.median(times[rule]):12.1f}{quotient:16.2f}")

    print("\nheld between the two halves of a step, MB (over backprop)")
    print(f"{'':24}" + "".join(f"{f'{depth} layers':>20}" for depth in arguments.depths))
    held = {
        (rule, depth): held_bytes(learner(rule, arguments, depth), batches[0])
        for rule in rules
        for depth in arguments.depths
    }
    for rule in rules:
        cells = [
            f"{held[rule, depth] / 1e6:.2f} ({held[rule, depth] / held['backprop', depth]:.2f})"
            for depth in arguments.depths
        ]
        print(f"{rule:24}" + "".join(f"{cell:>20}" for cell in cells))


def trains_gpt(rule: str) -> bool:
    try:
        load_recipe({"credit": rule})
    except RecipeError:
        return False
    return True


def learner(rule: str, arguments: argparse.Namespace, layers: int) -> Gradient:
    """A learner as a recipe builds it."""
    sizes = {key: getattr(arguments, key) for key in ("heads", "width", "context")}
    recipe = load_recipe({"credit": rule, "model": sizes | {"layers": layers}})
    model = build_model(recipe, arguments.vocab, "cpu")
    model.train()
    return build_learner(recipe, model, Solo())


def held_bytes(learner: Gradient, batch: Batch) -> int:
    """The probe that runs make at their beginning: `activation_bytes` in `summary.json`."""
    weights = learner.rating.weights(batch)
    return activation_bytes(learner.model, batch, weights, learner.objective, learner.credit)


if __name__ == "__main__":
    main()
