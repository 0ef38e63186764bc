"""Solvers, Jacobian products and the spectral radius, against dense matrices. float64."""

import pytest
import torch

from heterodox.model import dynamics as diagnosis
from heterodox.model import generate
from heterodox.model.dynamics import (
    Linearisation,
    Relaxed,
    SpectralRadius,
    all_before,
    per_example,
    per_position,
    relax,
    spectral_radius,
)
from tests.tiny import tiny_batch, tiny_gpt
from tests.tiny_equilibrium import tiny_equilibrium

F64 = torch.float64


def dense(matrices):
    """A map of states of one layer and one position by a matrix per example."""
    return lambda v: torch.einsum("bij,lbtj->lbti", matrices, v)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


class TestSpectralRadius:
    @pytest.mark.parametrize(("size", "dtype"), [(48, F64), (160, torch.float32), (160, F64), (400, F64)])
    def test_of_random_matrices_whose_largest_eigenvalues_are_complex(self, size, dtype):
        matrices = draw(3, size, size) / size**0.5
        eigenvalues = torch.linalg.eigvals(matrices)
        largest = eigenvalues[range(3), eigenvalues.abs().argmax(-1)]
        assert (largest.imag.abs() > 0.1).any(), "degenerate: no complex pairs"
        found = spectral_radius(dense(matrices.to(dtype)), draw(1, 3, 1, size).to(dtype))
        assert torch.allclose(found.values.to(F64), eigenvalues.abs().amax(-1), rtol=2e-3)
        assert found.within(2e-3).all()

    def test_of_a_map_that_is_far_from_normal(self):
        """Eight positions that each pass influence on to later ones, as attention does."""
        causal = torch.kron(torch.tril(draw(8, 8).fill_(1)), torch.ones(50, 50, dtype=F64))
        matrices = draw(2, 400, 400) / 20 * causal
        truth = torch.linalg.eigvals(matrices).abs().amax(-1)
        assert (torch.linalg.matrix_norm(matrices, 2) > 3 * truth).all(), "degenerate: nearly normal"
        found = spectral_radius(dense(matrices), draw(1, 2, 1, 400))
        assert torch.allclose(found.values, truth, rtol=1e-2)

    def test_what_is_unfinished_says_so(self):
        """The residual is that of the eigenvector found, so large ones mean that more products are needed."""
        matrices = draw(2, 400, 400) / 20
        truth = torch.linalg.eigvals(matrices).abs().amax(-1)
        short = spectral_radius(dense(matrices), draw(1, 2, 1, 400), most=16)
        assert short.products == 16
        assert ((short.values / truth - 1).abs() > 0.02).any(), "degenerate: enough products"
        assert not short.within(0.02).any()
        assert (truth <= short.values + 2 * short.residuals).all()

    def test_it_stops_once_the_residual_is_small(self):
        matrices = torch.diag_embed(torch.cat([torch.linspace(0, 0.5, 99, dtype=F64), torch.ones(1, dtype=F64)]))[None]
        found = spectral_radius(dense(matrices), draw(1, 1, 1, 100))
        assert found.products < 24
        assert float(found.values) == pytest.approx(1, rel=2e-3)

    def test_of_a_rotation_whose_growth_depends_on_the_moment(self):
        """A stretched rotation by a right angle: single steps grow threefold or shrink, the radius is 0.9."""
        matrix = torch.tensor([[0.0, 2.7], [-0.3, 0.0]], dtype=F64)[None]
        start = draw(1, 1, 1, 2)
        growth = [dense(matrix)(v).norm() / v.norm() for v in (start, dense(matrix)(start))]
        assert max(growth) > 1 > 0.9 > min(growth)
        assert float(spectral_radius(dense(matrix), start).values) == pytest.approx(0.9, rel=1e-9)

    def test_each_example_has_its_own(self):
        matrices = torch.stack([torch.eye(5, dtype=F64) * s for s in (0.5, 1.5)])
        assert spectral_radius(dense(matrices), draw(1, 2, 1, 5)).values.tolist() == pytest.approx([0.5, 1.5])

    def test_what_is_not_finite_has_none_and_spares_the_others(self):
        matrices = torch.stack([torch.eye(5, dtype=F64) * s for s in (torch.nan, 0.5, torch.inf)])
        found = spectral_radius(dense(matrices), draw(1, 3, 1, 5)).values
        assert found.isnan().tolist() == [True, False, True]
        assert float(found[1]) == pytest.approx(0.5)


class TestLinearisation:
    @pytest.mark.parametrize("options", [{}, {"layers": 2}, {"mlp_ratio": 0, "layer_norm": False}])
    def test_products_are_those_of_the_dense_jacobian(self, options):
        dynamics = tiny_equilibrium(**options).dynamics(tiny_batch(2).inputs)
        with torch.no_grad():
            z = dynamics.settle().state
        self.compare(dynamics, z, dynamics.step_size)

    def test_of_a_feed_forward_network(self):
        dynamics = tiny_gpt().dynamics(tiny_batch(2).inputs)
        with torch.no_grad():
            z = dynamics.settle().state
            assert torch.equal(dynamics.drive(z), z), "its fixed point is its forward pass"
        self.compare(dynamics, z, 1.0)

    def compare(self, dynamics, z, step_size):
        jacobian = torch.autograd.functional.jacobian(lambda z: dynamics.drive(z), z).reshape(z.numel(), -1)
        linear = Linearisation(dynamics, z)
        v = draw(*z.shape)
        assert torch.allclose(linear.jvp(v).flatten(), jacobian @ v.flatten(), atol=1e-12)
        assert torch.allclose(linear.vjp(v).flatten(), jacobian.T @ v.flatten(), atol=1e-12)
        assert (jacobian - jacobian.T).norm() > 0.5 * jacobian.norm(), "degenerate: symmetric"

    def test_the_diagnosis_is_the_radius_of_the_dense_jacobian(self):
        model, tokens = tiny_equilibrium(weight_std=0.2), tiny_batch(1).inputs
        dynamics = model.dynamics(tokens)
        with torch.no_grad():
            z = dynamics.settle().state
        jacobian = torch.autograd.functional.jacobian(lambda z: dynamics.drive(z), z).reshape(z.numel(), -1)
        kept = 1 - dynamics.step_size * dynamics.decay
        step = kept * torch.eye(z.numel(), dtype=F64) + dynamics.step_size * jacobian
        truth = float(torch.linalg.eigvals(step).abs().max())
        found = model.diagnose(tokens)
        assert found.values["spectral_radius"] == pytest.approx(truth, rel=2e-3)
        assert found.values["spectral_radius_residual"] <= 2e-3 * truth
        assert not found.warnings
        found = tiny_equilibrium(weight_std=0.5, layer_norm=False).diagnose(tokens)
        assert found.values["spectral_radius"] > 1
        assert f"{found.values['spectral_radius']:.3f}" in found.warnings[0]

    def test_an_unfinished_radius_counts_with_its_residual(self, monkeypatch):
        values, residuals = torch.tensor([0.9, 0.95, 0.98, 0.92]), torch.tensor([0.2, 0.005, 0.015, 0.1])
        found = SpectralRadius(values, residuals, 96)
        monkeypatch.setattr(diagnosis, "spectral_radius", lambda *_: found)
        (text,) = tiny_equilibrium().diagnose(tiny_batch().inputs).warnings
        assert text.startswith("the relaxation may not be contractive: the spectral radius of its step is at least")
        assert "0.920 (not converged, residual 0.1), and not safely below 1 in 2 of 4 examples" in text

    def test_only_states_that_are_lost_are_measured_at_the_start(self):
        model, tokens = tiny_equilibrium(weight_std=0.2), tiny_batch().inputs
        whole, start = model.dynamics(tokens), model.dynamics(tokens).start.detach()
        with torch.no_grad():
            settled = whole.settle()
        lost = settled.state.clone()
        lost[:, 1] = torch.nan
        whole.settle = lambda: Relaxed(lost, 150, settled.residuals)
        found = diagnosis.diagnose(whole, start, ["a remedy"])
        expected = diagnosis.step_radius(whole, settled.state).values
        at_start = diagnosis.step_radius(whole, start).values
        assert (at_start - expected).abs().min() > 1e-3, "degenerate: the radius is the same at both"
        largest = torch.where(torch.arange(4) == 1, at_start, expected).max()
        assert found.values["spectral_radius"] == pytest.approx(float(largest), rel=1e-6)
        assert "the states of 1 do not stay finite" in found.warnings[0]
        assert found.warnings[0].endswith("likely remedies: a remedy")


class TestSolvers:
    def test_both_find_the_fixed_point_and_anderson_sooner(self):
        matrix = draw(3, 6, 6)
        matrix = 0.95 * matrix / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
        bias = draw(1, 3, 1, 6)
        truth = torch.linalg.solve(torch.eye(6, dtype=F64) - matrix, bias[0, :, 0])
        found = {
            solver: relax(
                lambda z: dense(matrix)(z) + bias, torch.zeros_like(bias), steps=500, solver=solver, tolerance=1e-10
            )
            for solver in ("damped", "anderson")
        }
        for relaxed in found.values():
            assert torch.allclose(relaxed.state[0, :, 0], truth, atol=1e-7)
            assert relaxed.residual <= 1e-10
        assert found["anderson"].steps < 0.7 * found["damped"].steps

    @pytest.mark.parametrize("solver", ["damped", "anderson"])
    def test_an_example_stops_by_itself(self, solver):
        """An easy example in the company of a hard one takes the steps that it would take alone."""
        rates = torch.tensor([0.1, 0.9], dtype=F64).view(1, 2, 1, 1)
        start = draw(1, 2, 1, 24)
        turn = dense(torch.linalg.qr(draw(2, 24, 24)).Q)

        def step(z):
            return rates * turn(z) + 1

        both = relax(step, start, steps=300, solver=solver, tolerance=1e-6)
        first = dense(torch.linalg.qr(draw(2, 24, 24)).Q[:1])
        alone = relax(lambda z: 0.1 * first(z) + 1, start[:, :1], steps=300, solver=solver, tolerance=1e-6)
        assert alone.steps < both.steps
        assert torch.allclose(both.state[:, :1], alone.state, rtol=1e-12)

    @pytest.mark.parametrize("solver", ["damped", "anderson"])
    def test_nothing_leaks_from_later_tokens_to_earlier_ones(self, solver):
        model = tiny_equilibrium(solver=solver, tolerance=1e-3, steps=60, weight_std=0.2)
        tokens = tiny_batch().inputs
        whole, steps = model.features(tokens), model.steps_taken
        assert torch.allclose(model.features(tokens[:, :3]), whole[:, :3], rtol=1e-12)
        assert 3 < steps < 60

    def test_deciding_by_example_would_leak(self):
        """What the test before would miss if it could not fail."""
        model = tiny_equilibrium(weight_std=0.2)
        tokens = tiny_batch().inputs

        def states(tokens, dot, going_on):
            dynamics = model.dynamics(tokens)
            with torch.no_grad():
                return relax(
                    lambda z: z + dynamics.step_size * dynamics.force(z),
                    dynamics.start, steps=60, tolerance=1e-3, dot=dot, going_on=going_on,
                ).state  # fmt: skip

        part, whole = (states(t, per_example, lambda still: still) for t in (tokens[:, :3], tokens))
        assert (part - whole[:, :, :3]).norm() > 1e-6
        part, whole = (states(t, per_position, all_before) for t in (tokens[:, :3], tokens))
        assert torch.allclose(part, whole[:, :, :3], rtol=1e-12)


def test_generation_relaxes():
    model = tiny_equilibrium()
    prompt = tiny_batch(2).inputs[:, :2]
    tokens = generate(model, prompt, 3, temperature=0.0)
    assert tokens.shape == (2, 5)
    assert torch.equal(tokens[:, 2], model(prompt)[:, -1].argmax(-1))
