"""What mixes the values in attention: exact derivatives, causality, biases of the sigmoid. float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.func import jvp

from heterodox.model import CausalMix, FusedSoftmaxMix, SigmoidMix
from tests.derivatives import JVP_WARNING, LEADS, draw, is_exact, is_not_exact
from tests.measured import on_average

pytestmark = pytest.mark.filterwarnings(JVP_WARNING)

MIXES = {
    "softmax": lambda: CausalMix(2),
    "fused": lambda: FusedSoftmaxMix(2),
    "centred": lambda: FusedSoftmaxMix(2, form="centred"),
    "neg_log_n": lambda: SigmoidMix(2, context=5),
    "neg_log_row": lambda: SigmoidMix(2, context=5, bias="neg_log_row"),
    "zero": lambda: SigmoidMix(2, context=5, bias="zero"),
    "learned": lambda: SigmoidMix(2, context=5, bias="learned"),
    "straight_through": lambda: SigmoidMix(2, context=5, bias="neg_log_row", straight_through=True),
}


class TestMixes:
    def projections(self, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
        return draw(*lead, 5, 4), draw(*lead, 5, 4, seed=1), draw(*lead, 5, 4, seed=2)

    @pytest.mark.parametrize("name", [name for name in MIXES if name not in ("softmax", "straight_through")])
    def test_derivatives_are_exact(self, name):
        mix = MIXES[name]().double()
        inputs = self.projections(2)
        assert is_exact(mix, *inputs)
        assert gradgradcheck(mix, inputs)

    def test_but_for_the_straight_through_sigmoid(self):
        q, k, v = self.projections(2)
        mix = MIXES["straight_through"]().double()
        assert torch.equal(mix(q, k, v), MIXES["neg_log_row"]().double()(q, k, v))
        assert is_not_exact(lambda a: mix(a, k.detach(), v.detach()), q)
        assert is_exact(lambda c: mix(q.detach(), k.detach(), c), v)

    @pytest.mark.parametrize("name", MIXES)
    @pytest.mark.parametrize("lead", LEADS)
    def test_no_position_sees_a_later_one_and_any_leading_shape_goes(self, name, lead):
        mix = MIXES[name]().double()
        q, k, v = self.projections(*lead)
        later = [torch.cat([x[..., :3, :], x[..., 3:, :] + 1.0], -2) for x in (q, k, v)]
        before, after = mix(q, k, v), mix(*later)
        assert torch.allclose(before[..., :3, :], after[..., :3, :], rtol=1e-12)
        assert not torch.allclose(before[..., 3:, :], after[..., 3:, :], rtol=1e-2)
        short = mix(*(x[..., :3, :] for x in (q, k, v)))
        assert torch.allclose(short, before[..., :3, :], rtol=1e-12)

    @pytest.mark.parametrize("form", ["fused", "centred"])
    def test_written_out_softmax_is_pytorchs(self, form):
        inputs = self.projections(3)
        plain, written = CausalMix(2), FusedSoftmaxMix(2, form=form)
        assert torch.allclose(plain(*inputs), written(*inputs), rtol=1e-12)
        delta = draw(3, 5, 4, seed=3, requires_grad=False)
        ours, theirs = (torch.autograd.grad(mix(*inputs), inputs, delta) for mix in (written, plain))
        assert all(b.norm() > 1e-2 and torch.allclose(a, b, rtol=1e-10) for a, b in zip(ours, theirs, strict=True))

    def test_sigmoid_with_the_rows_own_bias_at_zero_scores_is_uniform_softmax(self):
        _, k, v = self.projections(2)
        q = torch.zeros_like(k)
        uniform = v.cumsum(-2) / torch.arange(1, 6, dtype=torch.float64)[:, None]
        assert torch.allclose(CausalMix(2)(q, k, v), uniform, rtol=1e-12)
        assert torch.allclose(MIXES["neg_log_row"]()(q, k, v), uniform, rtol=1e-12)
        for name, weight in (("neg_log_n", 1 / 6), ("zero", 1 / 2)):  # σ(−ln 5), σ(0)
            assert torch.allclose(MIXES[name]()(q, k, v), v.cumsum(-2) * weight, rtol=1e-12)

    @pytest.mark.parametrize("name", ["neg_log_row", "straight_through"])
    def test_the_first_rows_infinite_bias_leaves_no_nan(self, name):
        mix = MIXES[name]().double()
        inputs = self.projections(2)
        out = mix(*inputs)
        assert torch.equal(out[:, 0], inputs[2][:, 0])
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        plain = tuple(x.detach() for x in inputs)
        value, tangent = jvp(mix, plain, tuple(torch.ones_like(x) for x in plain))
        assert all(bool(t.isfinite().all()) for t in (out, *grads, *twice, value, tangent))

    def test_the_learned_bias_starts_at_minus_the_log_of_the_context_and_learns(self):
        mix = MIXES["learned"]()
        assert mix.bias.item() == pytest.approx(-math.log(5))
        inputs = [x.detach().float() for x in self.projections(2)]
        assert torch.allclose(mix(*inputs), MIXES["neg_log_n"]()(*inputs), atol=1e-6)
        mix = mix.double()
        q, k, v = (x.detach() for x in self.projections(2))

        def of_bias(bias):
            return torch.func.functional_call(mix, {"bias": bias}, (q, k, v))

        assert is_exact(of_bias, mix.bias.detach().clone().requires_grad_())

    @pytest.mark.parametrize("mix", [FusedSoftmaxMix(2, 0.5), SigmoidMix(2, 0.5, context=5, bias="zero")])
    def test_dropout_falls_on_the_weights_in_training_only(self, mix):
        q, k, v = (x.detach() for x in self.projections(400))
        torch.manual_seed(0)
        dropped = mix.train()(q, k, v)
        whole = mix.eval()(q, k, v)
        assert not torch.allclose(dropped, whole, rtol=1e-2)
        assert on_average(dropped.mean(0), whole.mean(0), atol=0.5)
        assert torch.equal(mix(q, k, v), whole)

    def test_the_centred_form_refuses_dropout(self):
        with pytest.raises(ValueError, match=r"dropout, which is 0\.5"):
            FusedSoftmaxMix(2, 0.5, form="centred")
