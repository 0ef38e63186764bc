"""How strong a nudge is. float64."""

import pytest
import torch

from heterodox.credit.equilibrium.propagation import strength
from tests.measured import exactly, within
from tests.tiny_equilibrium import converged, distance, gradients, relaxed_names, tiny_equilibrium


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_in_units_of_the_state_no_position_is_pushed_further_than_told():
    state, nudge = draw(3, 5, 8), draw(3, 5, 8, seed=1)
    pushed = strength(0.01, "state", state, nudge) * nudge
    shares = pushed.norm(dim=-1) / state.norm(dim=-1)
    assert torch.allclose(shares.amax(1), torch.full((3,), 0.01, dtype=torch.float64), rtol=1e-12)
    assert (shares.amin(1) < 0.009).all(), "degenerate: all positions alike"


def test_it_follows_the_scale_of_the_state_and_the_other_unit_does_not():
    state, nudge = draw(3, 5, 8), draw(3, 5, 8, seed=1)
    # A state half as large, below a norm: its gradient is twice as large.
    relative = strength(0.01, "state", state / 2, 2 * nudge) / strength(0.01, "state", state, nudge)
    assert torch.allclose(relative, torch.full_like(relative, 0.25), rtol=1e-12)
    assert exactly(strength(0.01, "gradient", state / 2, 2 * nudge), 0.01)


def test_an_example_without_a_gradient_is_not_pushed_to_infinity():
    state, nudge = draw(2, 5, 8), draw(2, 5, 8, seed=1)
    nudge[1] = 0
    assert exactly(strength(0.01, "state", state, nudge)[1], 0.01)


@pytest.mark.parametrize("unit", ["state", "gradient"])
def test_the_estimate_does_not_depend_on_the_unit(unit):
    """Nor on the scale of the losses, which the state's unit takes out of the phases altogether."""
    model = tiny_equilibrium()
    names = relaxed_names(model)
    one = gradients(converged(beta=1e-3, beta_unit=unit), model)
    weights = torch.tensor([0.5, 1.5, 0.25, 1.75], dtype=torch.float64)
    many = gradients(converged(beta=1e-3, beta_unit=unit), model, weights=1000 * weights)
    many = {name: grad / 1000 for name, grad in many.items()}
    apart = distance(many, one, names)
    assert within(apart, 1e-9) if unit == "state" else apart > 1e-6
