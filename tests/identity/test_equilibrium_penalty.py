"""The Jacobian penalty against finite differences, and what it is for. float64."""

import torch

from heterodox.core.rng import Streams
from heterodox.credit import BPTT, Equilibrium, Implicit
from heterodox.credit.feedback_alignment import JacobianPenalty
from heterodox.model.dynamics import Linearisation
from tests.measured import within
from tests.tiny import tiny_batch
from tests.tiny_equilibrium import WEIGHTS, gradients, tiny_equilibrium


def growth(model, z, u) -> torch.Tensor:
    """mean(weights · ‖J_Gᵀu‖²/‖u‖²) by definition."""
    pulled = Linearisation(model.dynamics(tiny_batch().inputs), z).vjp(u)
    return (WEIGHTS * pulled.square().sum((0, 2, 3)) / u.square().sum((0, 2, 3))).mean()


def test_its_gradient_is_that_of_the_growth():
    model = tiny_equilibrium()
    penalty = JacobianPenalty(0.5, Streams(0))
    dynamics = model.dynamics(tiny_batch().inputs)
    with torch.no_grad():
        z = dynamics.settle().state
    linear = Linearisation(dynamics, z)
    penalty.aim(linear)
    found, metrics = penalty.gradients(model, linear, WEIGHTS)
    assert metrics["jacobian_growth"] > 0.1
    for name in ("blocks.0.ln1.weight", "blocks.0.attn.q.weight", "blocks.0.attn.o.weight", "blocks.0.mlp.fc.weight"):
        parameter, step = model.get_parameter(name), 1e-5
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            up = growth(model, z, linear.probe)
            parameter.add_(direction, alpha=-2 * step)
            down = growth(model, z, linear.probe)
            parameter.add_(direction, alpha=step)
        slope = 0.5 * (up - down) / (2 * step)
        assert abs(slope) > 1e-4, "degenerate: flat"
        assert torch.allclose((found[name] * direction).sum(), slope, rtol=1e-6), name


def test_its_probe_finds_what_a_random_vector_misses():
    """Turned by powers of the Jacobian the probe sees growth near the largest eigenvalue."""
    model = tiny_equilibrium(weight_std=0.2)
    dynamics = model.dynamics(tiny_batch().inputs)
    with torch.no_grad():
        z = dynamics.settle().state
    jacobian = torch.autograd.functional.jacobian(lambda z: dynamics.drive(z), z)
    squares = [jacobian[:, b, :, :, :, b].reshape(48, 48) for b in range(4)]
    frobenius = sum(float(m.square().sum()) / 48 for m in squares) / 4
    eigenvalues = sum(float(torch.linalg.eigvals(m).abs().max() ** 2) for m in squares) / 4
    seen = {}
    for powers in (0, 8):
        seen[powers] = 0.0
        for seed in range(20):
            linear, penalty = Linearisation(dynamics, z), JacobianPenalty(1.0, Streams(seed), powers)
            penalty.aim(linear)
            seen[powers] += float(penalty.gradients(model, linear, torch.ones(4))[1]["jacobian_growth"] ** 2) / 20
    assert frobenius < 0.7 * eigenvalues, "degenerate: all directions alike"
    assert within(abs(seen[0] / frobenius - 1), 0.2, "on average")
    assert seen[8] > 0.8 * eigenvalues > 1.1 * seen[0]


def test_every_rule_adds_the_same_penalty():
    model = tiny_equilibrium()
    added = []
    for rule in (Equilibrium, Implicit, BPTT):
        plain, penalised = gradients(rule(), model), gradients(rule(JacobianPenalty(0.1, Streams(0))), model)
        added.append({name: penalised[name] - plain[name] for name in plain})
    for name, difference in added[0].items():
        assert (difference.norm() > 1e-9) == (
            name.startswith("blocks.") and not name.endswith(("k.bias", "v.bias", "o.bias", "proj.bias"))
        ), name
        assert all(torch.allclose(difference, other[name], atol=1e-9) for other in added[1:]), name


def test_descending_it_contracts():
    model = tiny_equilibrium(weight_std=0.25)
    tokens, penalty = tiny_batch().inputs, JacobianPenalty(1.0, Streams(0))
    before = model.diagnose(tokens).values["spectral_radius"]
    for _ in range(15):
        dynamics = model.dynamics(tokens)
        with torch.no_grad():
            z = dynamics.settle().state
        linear = Linearisation(dynamics, z)
        penalty.aim(linear)
        found, _ = penalty.gradients(model, linear, WEIGHTS)
        with torch.no_grad():
            for name, gradient in found.items():
                model.get_parameter(name).sub_(gradient, alpha=0.01)
    assert model.diagnose(tokens).values["spectral_radius"] < 0.9 * before
