"""An equilibrium model small enough for dense Jacobians, and strong enough to be far from linear and symmetric."""

import torch

from heterodox.core.rng import Streams
from heterodox.core.types import Batch
from heterodox.credit import Equilibrium as Credit
from heterodox.model import Equilibrium
from heterodox.objective import CrossEntropy
from tests.tiny import tiny_batch

WEIGHTS = torch.tensor([0.5, 1.5, 0.25, 1.75], dtype=torch.float64)
CONVERGED = {"steps": 150, "tolerance": 1e-14}


def tiny_equilibrium(**options) -> Equilibrium:
    """One block of width 8 in float64 whose free phase converges to rounding."""
    options = {"heads": 2, "width": 8, "context": 6, "bias": True, "weight_std": 0.15} | CONVERGED | options
    model = Equilibrium.Config(**options).build(11, Streams(0)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                noise = torch.randn(parameter.shape, generator=Streams(1).generator("init", name), dtype=torch.float64)
                parameter.add_(0.1 * noise)
    return model


def gradients(rule, model, batch: Batch | None = None, weights: torch.Tensor = WEIGHTS) -> dict[str, torch.Tensor]:
    return rule.signal(model, batch or tiny_batch(), weights, CrossEntropy()).grads


def converged(**options) -> Credit:
    """Equilibrium propagation whose nudged phases converge to rounding, and that withholds nothing if told to stop."""
    return Credit(**{"nudged_steps": 70, "tolerance": 1e-9, "nudged_limit": None} | options)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names=None) -> float:
    """The relative difference of two sets of gradients, as one vector, without keys' biases (softmax ignores them)."""
    names = names or [name for name in b if not name.endswith("k.bias")]
    assert all(b[name].norm() > 1e-6 for name in names), "degenerate: nothing to learn"
    apart = sum(float((a[name] - b[name]).square().sum()) for name in names)
    return (apart / sum(float(b[name].square().sum()) for name in names)) ** 0.5


def relaxed_names(model: Equilibrium) -> list[str]:
    """Parameters that learn from relaxed states, without keys' biases."""
    names = [name for name, _ in model.named_parameters() if name not in model.readout_names]
    return [name for name in names if not name.endswith("k.bias")]
