"""The linear layer whose errors travel through feedback, alone and put into a model. float64."""

import pytest
import torch
from torch import nn

from heterodox.core.rng import Streams
from heterodox.credit import Backprop, FeedbackAlignment
from heterodox.credit.feedback import feedback_linear, feedback_path, linear_layers
from tests.derivatives import JVP_WARNING
from tests.signals import same, signal_of
from tests.tiny import tiny_gpt


class TestFeedbackLinear:
    """The layer alone, on any leading shape and under torch.func."""

    def tensors(self, *lead: int):
        torch.manual_seed(1)
        double = {"dtype": torch.float64, "requires_grad": True}
        return (
            torch.randn(*lead, 3, **double),
            torch.randn(4, 3, **double),
            torch.randn(4, **double),
            torch.randn(4, 3, dtype=torch.float64),
        )

    @pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3)])
    def test_with_its_own_weight_as_feedback_its_backward_pass_is_exact(self, lead):
        x, weight, bias, _ = self.tensors(*lead)
        assert torch.autograd.gradcheck(lambda a, b, c: feedback_linear(a, b, c, weight.detach()), (x, weight, bias))

    @pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
    def test_errors_travel_through_the_feedback(self, lead):
        x, weight, bias, feedback = self.tensors(*lead)
        out = feedback_linear(x, weight, bias, feedback)
        assert same(out, nn.functional.linear(x, weight, bias))
        delta = torch.randn_like(out)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(out, (x, weight, bias), delta)
        assert same(grad_x, delta @ feedback)
        assert not torch.allclose(grad_x, delta @ weight)
        rows = delta.reshape(-1, 4)
        assert same(grad_weight, rows.T @ x.reshape(-1, 3))
        assert same(grad_bias, rows.sum(0))

    @pytest.mark.filterwarnings(JVP_WARNING)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
    def test_forward_mode_is_that_of_the_forward_pass_whatever_the_feedback(self, lead, bias):
        x, weight, b, feedback = (tensor.detach() for tensor in self.tensors(*lead))
        primals = (x, weight, b) if bias else (x, weight)
        tangents = tuple(torch.randn_like(primal) for primal in primals)

        def ours(x, weight, b=None):
            return feedback_linear(x, weight, b, feedback)

        out, found = torch.func.jvp(ours, primals, tangents)
        also, wanted = torch.func.jvp(nn.functional.linear, primals, tangents)
        assert same(out, also)
        assert same(found, wanted)
        for place in range(len(primals)):  # each alone
            alone = tuple(t if n == place else torch.zeros_like(t) for n, t in enumerate(tangents))
            _, wanted = torch.func.jvp(nn.functional.linear, primals, alone)
            assert wanted.norm() > 0.1

            def of_one(primal, place=place):
                return ours(*primals[:place], primal, *primals[place + 1 :])

            _, found = torch.func.jvp(of_one, (primals[place],), (tangents[place],))
            assert same(found, wanted)

    @pytest.mark.filterwarnings(JVP_WARNING)
    def test_forward_mode_under_vmap(self):
        x, weight, bias, feedback = (tensor.detach() for tensor in self.tensors(2, 5))
        directions = torch.randn(7, *x.shape, dtype=torch.float64)

        def along(direction):
            return torch.func.jvp(lambda a: feedback_linear(a, weight, bias, feedback), (x,), (direction,))[1]

        found = torch.func.vmap(along)(directions)
        assert same(found, directions @ weight.T)
        assert not torch.allclose(found, directions @ feedback.T, rtol=1e-2)

        def turned(a, tangent):
            return torch.func.jvp(lambda w: feedback_linear(a, w, bias, feedback), (weight,), (tangent,))[1]

        tangents = torch.randn(2, *weight.shape, dtype=torch.float64)
        assert same(torch.func.vmap(turned)(x, tangents), x @ tangents.mT)

    def test_under_vmap_and_grad(self):
        x, weight, bias, feedback = self.tensors(5)
        with torch.no_grad():
            per_example = torch.func.vmap(
                torch.func.grad(lambda w, a: feedback_linear(a, w, bias, feedback).square().sum()),
                in_dims=(None, 0),
            )(weight, x)
        assert per_example.shape == (5, 4, 3)
        whole = torch.autograd.grad(feedback_linear(x, weight, bias, feedback).square().sum(), weight)[0]
        assert same(per_example.sum(0), whole)

    def test_the_path_leaves_no_trace_on_the_model(self):
        model = tiny_gpt()
        before = signal_of(Backprop(), model).grads
        matrices = FeedbackAlignment.Config().build(model, Streams(0)).feedback
        with pytest.raises(RuntimeError, match="stop"), feedback_path(model, matrices):
            raise RuntimeError("stop")
        after = signal_of(Backprop(), model).grads
        assert all(torch.equal(before[name], after[name]) for name in before)
        with pytest.raises(KeyError), feedback_path(model, {"nowhere": torch.zeros(1, 1)}):
            pass

    def test_of_nested_paths_the_innermost_counts(self):
        x, _, _, feedback = self.tensors(2)
        layer = nn.Linear(3, 4).double()
        net, other = nn.Sequential(layer), -feedback

        def error_at_input():
            return torch.autograd.grad(net(x).sum(), x)[0]

        def sent_by(matrix):
            return torch.ones(2, 4, dtype=torch.float64) @ matrix

        with feedback_path(net, {"0": feedback}):
            with feedback_path(net, {"0": other}):
                assert same(error_at_input(), sent_by(other))
            assert same(error_at_input(), sent_by(feedback))
        assert same(error_at_input(), sent_by(layer.weight))
        assert "forward" not in vars(layer)
        assert not torch.allclose(sent_by(feedback), sent_by(layer.weight))
        assert not torch.allclose(sent_by(feedback), sent_by(other))

    def test_a_layer_that_computes_something_else_is_refused(self):
        class Doubled(nn.Linear):
            def forward(self, input):
                return 2 * super().forward(input)

        net = nn.Sequential(nn.Linear(3, 4), Doubled(4, 2))
        matrices = {name: torch.zeros_like(layer.weight) for name, layer in linear_layers(net).items()}
        with pytest.raises(ValueError, match="layer '1' is a Doubled"), feedback_path(net, matrices):
            pass
        assert not any("forward" in vars(layer) for layer in net)
