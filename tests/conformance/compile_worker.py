"""Run by test_compile in a process of its own: dynamo cannot trace functions whose shapes are checked at run time."""

import sys
from typing import Any

import torch

from heterodox.app.session import build_learner, build_model
from heterodox.core.comm import Solo
from heterodox.objective import CrossEntropy
from tests.conformance.combinations import CREDITS, recipe_of
from tests.switches import CASES, SWITCHES
from tests.tiny import tiny_batch


def check(credit: str, **model_options: Any) -> None:
    """The signal of a compiled model is the plain one, bit for bit, where dynamo's graphs are run op by op."""
    torch.compiler.reset()
    recipe = recipe_of(credit, "sgd", model=model_options)
    model = build_model(recipe, 8, "cpu")
    rule = build_learner(recipe, model, Solo()).credit
    batch, weights = tiny_batch(4, 16, 8), torch.ones(4)
    plain = rule.signal(model, batch, weights, CrossEntropy())
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    whole = credit != "direct_feedback" and not model_options  # hooks, and functions with forward mode, break graphs
    model.compile(backend=backend, fullgraph=whole)
    for _ in range(2):
        compiled = rule.signal(model, batch, weights, CrossEntropy())
        assert compiled.grads.keys() == plain.grads.keys(), credit
        for name in plain.grads:
            assert torch.equal(compiled.grads[name], plain.grads[name]), (credit, name)
    assert graphs, f"{credit}: nothing was compiled"


if __name__ == "__main__":
    for name in CREDITS:
        check(name)
        check(name, **CASES["all_at_once"])
        sys.stdout.write(f"{name}\n")
    for switch, options in SWITCHES.items():
        check("backprop", **options)
        sys.stdout.write(f"{switch}\n")
