"""The options of a nudged phase do what their definitions say, each through the recipe's section. float64."""

import pytest
import torch

from heterodox.core.rng import Streams
from heterodox.core.types import Batch
from heterodox.credit import Equilibrium
from heterodox.credit.equilibrium.shared import read_out
from heterodox.model.dynamics import Linearisation
from heterodox.objective import CrossEntropy
from tests.measured import is_of_order, within
from tests.tiny import tiny_batch
from tests.tiny_equilibrium import WEIGHTS, distance, gradients, relaxed_names, tiny_equilibrium

ONE = torch.ones(1, dtype=torch.float64)


def rule(model, **options) -> Equilibrium:
    options = {"nudged_limit": None, "beta_unit": "gradient"} | options
    return Equilibrium.Config(**options).build(model, Streams(0))


def settled(model, batch: Batch, weights: torch.Tensor) -> tuple:
    """The dynamics, z*, and ∂L/∂z at any state of the last layer."""
    dynamics = model.dynamics(batch.inputs)
    with torch.no_grad():
        rest = dynamics.settle().state
    return dynamics, rest, lambda z: read_out(model, z[-1], batch, weights, CrossEntropy()).nudge


@pytest.mark.parametrize("step_size", [0.2, 0.3])
def test_the_step_size_is_that_of_the_nudged_steps(step_size):
    """In the limit of a small nudge they are a ← a + ε·(∂L/∂z + (J_G − d)ᵀ a), whatever the model's own ε."""
    model, batch = tiny_equilibrium(), tiny_batch()
    dynamics, rest, gradient = settled(model, batch, WEIGHTS)
    assert dynamics.step_size == 0.5
    linear, nudge = Linearisation(dynamics, rest), gradient(rest)
    names = relaxed_names(model)

    def by_hand(size: float) -> dict[str, torch.Tensor]:
        a = torch.zeros_like(rest)
        for _ in range(4):
            a = a + size * (linear.vjp(a) - dynamics.decay * a + nudge)
        read = linear.parameter_vjp(a / batch.num_tokens, [model.get_parameter(name) for name in names])
        return dict(zip(names, read, strict=True))

    found = gradients(rule(model, beta=1e-4, nudged_steps=4, step_size=step_size), model)
    assert within(distance(found, by_hand(step_size), names), 1e-6)
    assert distance(found, by_hand(dynamics.step_size), names) > 0.05


def test_the_tolerance_ends_the_nudged_phases():
    """Where the first step within it is, and not before: as many fixed steps give the same to the bit."""
    model, batch = tiny_equilibrium(), tiny_batch(1)
    options = {"beta": 1e-3}

    def signal(**more):
        return rule(model, **options, **more).signal(model, batch, ONE, CrossEntropy())

    fixed = [signal(nudged_steps=steps) for steps in range(1, 41)]
    residuals = [float(one.metrics["nudged_residual"]) for one in fixed]
    first = next(index for index, residual in enumerate(residuals) if residual <= 1e-3)
    assert 3 < first < 38, "degenerate: all steps or none"
    stopped = signal(nudged_steps=40, tolerance=1e-3)
    assert stopped.cost.flops == fixed[first].cost.flops < fixed[-1].cost.flops
    assert all(torch.equal(gradient, fixed[first].grads[name]) for name, gradient in stopped.grads.items())
    assert distance(stopped.grads, fixed[-1].grads, relaxed_names(model)) > 1e-5


@pytest.mark.parametrize("loss_gradient", ["frozen", "live"])
def test_the_nudged_state_is_at_rest_under_its_own_nudge(loss_gradient):
    """F(z) − β·∂L/∂z − (J − Jᵀ)(z − z*) = 0 with ∂L/∂z at z*, or at z: each at its own, not at the other's.

    The position embedding's gradient is the adjoint of a single example, so z = z* − β·a is known.
    """
    model, batch, beta = tiny_equilibrium(), tiny_batch(1), 0.2
    dynamics, rest, gradient = settled(model, batch, ONE)
    options = {"beta": beta, "nudge": "one_sided", "nudged_steps": 150, "tolerance": 1e-13}
    found = gradients(rule(model, loss_gradient=loss_gradient, **options), model, batch, ONE)
    z = rest - beta * batch.num_tokens * found["pos_emb.weight"][None, None]
    linear, moved = Linearisation(dynamics, rest), z - rest
    with torch.no_grad():
        force = dynamics.force(z)
    turned = linear.jvp(moved) - linear.vjp(moved)

    def push(state: torch.Tensor) -> float:
        return float((force[-1] - beta * gradient(state) - turned[-1]).norm() / force.norm())

    pushes = {"frozen": push(rest), "live": push(z)}
    own = pushes.pop(loss_gradient)
    assert within(own, 1e-9)
    assert pushes.popitem()[1] > 1e-3


def test_a_live_gradient_changes_a_centred_pair_by_the_square_of_the_nudge():
    model = tiny_equilibrium()
    names, apart, betas = relaxed_names(model), [], (0.1, 0.05)
    for beta in betas:
        options = {"beta": beta, "nudged_steps": 70}
        frozen, live = (gradients(rule(model, loss_gradient=kind, **options), model) for kind in ("frozen", "live"))
        apart.append(distance(live, frozen, names))
    assert apart[1] > 1e-6
    assert is_of_order(apart, betas, 2, 0.13)
