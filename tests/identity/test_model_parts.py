"""The model's parts alone: every backward pass that claims to be exact is, and those that do not are not. float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.func import grad, jvp, vmap

from heterodox.core.rng import Streams
from heterodox.model import (
    DirectionalVQ,
    FrozenSubspace,
    LayerNorm,
    StraightThroughGELU,
    StraightThroughSigmoid,
    hard_top_k,
    layer_norm,
    softmax_value,
)
from tests.derivatives import JVP_WARNING, LEADS, draw, forward_mode_is_the_transpose, is_exact, is_not_exact
from tests.measured import exactly

pytestmark = pytest.mark.filterwarnings(JVP_WARNING)

BACKWARDS = ["exact", "straight_through", "center_scale", "projected"]


class TestStraightThrough:
    @pytest.mark.parametrize("lead", LEADS)
    @pytest.mark.parametrize(
        ("module", "plain"), [(StraightThroughSigmoid(), torch.sigmoid), (StraightThroughGELU(), F.gelu)]
    )
    def test_the_value_is_the_functions_and_the_derivative_is_1(self, module, plain, lead):
        x = draw(*lead, 4)
        delta = draw(*lead, 4, seed=1, requires_grad=False)
        assert torch.equal(module(x), plain(x))
        assert torch.equal(torch.autograd.grad(module(x), x, delta)[0], delta)
        assert is_not_exact(module, x)
        assert is_exact(plain, x)
        assert forward_mode_is_the_transpose(module, x)
        with torch.no_grad():
            per_example = vmap(grad(lambda a: module(a).square().sum()))(draw(5, *lead, 4, requires_grad=False))
        assert per_example.shape == (5, *lead, 4)

    def test_twice(self):
        """The second derivative sees the first one as it is computed: that of module² is 2 · module, then 2."""
        x = draw(3)
        (first,) = torch.autograd.grad(StraightThroughSigmoid()(x).square().sum(), x, create_graph=True)
        assert torch.equal(first, 2 * torch.sigmoid(x))
        assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.full_like(x, 2.0))

    def test_infinities_stay_infinities(self):
        x = torch.tensor([-torch.inf, 0.0, torch.inf], requires_grad=True)
        assert exactly(StraightThroughSigmoid()(x).tolist(), [0.0, 0.5, 1.0])


class TestLayerNorm:
    @pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2, 1.0])
    @pytest.mark.parametrize("lead", LEADS)
    def test_projected_is_the_exact_gradient_for_any_eps(self, lead, eps):
        def projected(x, weight, bias):
            return layer_norm(x, (5,), weight, bias, eps, backward="projected")

        x, weight, bias = draw(*lead, 5), draw(5, seed=1), draw(5, seed=2)
        assert is_exact(projected, x, weight, bias)
        assert gradgradcheck(projected, (x, weight, bias))

    @pytest.mark.parametrize("backward", ["center_scale", "straight_through"])
    def test_the_others_are_not_but_for_their_own_parameters(self, backward):
        x, weight, bias = draw(3, 5), draw(5, seed=1), draw(5, seed=2)
        assert is_not_exact(lambda a: layer_norm(a, (5,), weight.detach(), None, 1e-5, backward=backward), x)
        assert is_exact(lambda w, b: layer_norm(x.detach(), (5,), w, b, 1e-5, backward=backward), weight, bias)

    def test_what_each_passes_on(self):
        x, weight = draw(3, 5), draw(5, seed=1, requires_grad=False)
        delta = draw(3, 5, seed=2, requires_grad=False)
        found = {
            backward: torch.autograd.grad(layer_norm(x, (5,), weight, None, 0.1, backward=backward), x, delta)[0]
            for backward in BACKWARDS
        }
        with torch.no_grad():
            inverse = (x.var(-1, correction=0, keepdim=True) + 0.1).rsqrt()
            z = (x - x.mean(-1, keepdim=True)) * inverse
            v = weight * delta
            centred = v - v.mean(-1, keepdim=True)
            late = weight * (delta - delta.mean(-1, keepdim=True) - z * (delta * z).mean(-1, keepdim=True)) * inverse
        same = {"rtol": 1e-12, "atol": 1e-14}
        assert torch.equal(found["straight_through"], delta)
        assert torch.allclose(found["center_scale"], centred * inverse, **same)
        assert torch.allclose(found["projected"], (centred - z * (v * z).mean(-1, keepdim=True)) * inverse, **same)
        assert torch.allclose(found["projected"], found["exact"], **same)
        assert not torch.allclose(found["projected"], late, rtol=1e-2)  # γ is applied before projecting, not after
        assert not torch.allclose(found["projected"], found["center_scale"], rtol=1e-2)

    @pytest.mark.parametrize("backward", BACKWARDS)
    @pytest.mark.parametrize("shape", [(5,), (4, 5)])
    def test_values_are_the_same_and_forward_mode_is_the_transpose(self, shape, backward):
        norm, plain = LayerNorm(list(shape), backward=backward).double(), torch.nn.LayerNorm(shape).double()
        for parameter, other in zip(norm.parameters(), plain.parameters(), strict=True):
            parameter.data = other.data = draw(*shape, seed=parameter.ndim, requires_grad=False)
        x = draw(2, 3, *shape)
        assert torch.equal(norm(x), plain(x))
        assert forward_mode_is_the_transpose(norm, x)
        with torch.no_grad():
            assert torch.allclose(vmap(norm)(x.detach()), plain(x), rtol=1e-13)

    @pytest.mark.parametrize("backward", BACKWARDS)
    def test_forward_mode_of_a_batched_call(self, backward):
        def norm(a: Tensor) -> Tensor:
            return layer_norm(a, (4, 5), backward=backward)

        x, direction = (draw(3, 4, 5, seed=seed, requires_grad=False) for seed in (0, 1))
        batched = jvp(vmap(norm), (x,), (direction,))[1]
        assert batched.norm() > 0.1
        assert torch.allclose(batched, jvp(norm, (x,), (direction,))[1], rtol=1e-12)

    def test_another_shape_is_refused(self):
        with pytest.raises(ValueError, match=r"of shape \(3, 5\) does not end in \(4,\)"):
            layer_norm(draw(3, 5), (4,), backward="projected")

    @pytest.mark.parametrize("backward", BACKWARDS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_without_bias_and_without_gains(self, bias, backward):
        for norm in (
            LayerNorm(4, bias=bias, backward=backward),
            LayerNorm(4, elementwise_affine=False, backward=backward),
        ):
            norm(torch.randn(2, 4, requires_grad=True)).square().sum().backward()
            assert all(parameter.grad is not None for parameter in norm.parameters())


class TestSoftmaxValue:
    def tensors(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of a causal attention, values and a dropout mask."""
        scores, values = draw(*lead, 4, 4), draw(*lead, 4, 3, seed=1)
        kept = torch.rand(*lead, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6
        assert kept.any()
        assert not kept.all()
        return scores, values, kept.double() / 0.6

    @pytest.mark.parametrize("lead", LEADS)
    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_the_fused_backward_pass_is_exact_dropout_included(self, lead, dropout, causal):
        scores, values, mask = self.tensors(lead)
        mask = mask if dropout else None
        hidden = ~torch.ones(4, 4, dtype=torch.bool).tril()

        def fused(s, v):
            return softmax_value(s.masked_fill(hidden, -torch.inf) if causal else s, v, mask)

        assert is_exact(fused, scores, values)
        assert gradgradcheck(fused, (scores, values))
        weights = (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1)
        expected = (weights if mask is None else weights * mask) @ values
        assert torch.allclose(fused(scores, values), expected, rtol=1e-13)

    def test_the_centred_form_is_exact_without_dropout_only(self):
        scores, values, mask = self.tensors((2,))
        assert is_exact(lambda s, v: softmax_value(s, v, form="centred"), scores, values)
        assert is_not_exact(lambda s, v: softmax_value(s, v, mask, form="centred"), scores, values)

        def of_scores(s):
            return softmax_value(s, values.detach(), mask, form="centred")

        delta = draw(2, 4, 3, seed=5, requires_grad=False)
        output = of_scores(scores)
        (found,) = torch.autograd.grad(output, scores, delta)
        apart = values[..., None, :, :] - output[..., :, None, :]  # V_j − O_i
        literal = scores.softmax(-1) * (delta[..., :, None, :] * apart).sum(-1)
        assert torch.allclose(found, literal.detach(), rtol=1e-12)
        assert forward_mode_is_the_transpose(of_scores, scores)

    def test_under_vmap_and_grad(self):
        scores, values, mask = (t.detach() for t in self.tensors((3,)))
        with torch.no_grad():
            one_by_one = vmap(grad(lambda s, v, m: softmax_value(s, v, m).square().sum()))(scores, values, mask)
            whole = grad(lambda s: softmax_value(s, values, mask).square().sum())(scores)
        assert whole.norm() > 1e-2
        assert torch.allclose(one_by_one, whole, rtol=1e-12)


class TestBottlenecks:
    @pytest.mark.parametrize("lead", LEADS)
    def test_top_k_keeps_the_largest_and_their_errors(self, lead):
        x = draw(*lead, 6)
        kept = hard_top_k(x, 2)
        assert bool(((kept != 0).sum(-1) == 2).all())
        assert bool((kept.abs().sum(-1) == x.abs().topk(2).values.sum(-1)).all())
        assert torch.equal(torch.autograd.grad(kept.sum(), x)[0], (kept != 0).double())
        assert is_exact(lambda a: hard_top_k(a, 2), x)
        assert gradgradcheck(lambda a: hard_top_k(a, 2).square(), (x,))
        assert torch.equal(hard_top_k(x, 6), x)
        with torch.no_grad():
            assert torch.equal(vmap(lambda a: hard_top_k(a, 2))(x[None]), kept[None])

    @pytest.mark.parametrize("k", [0, 7])
    def test_top_k_of_more_than_there_are(self, k):
        with pytest.raises(ValueError, match=f"keeps {k} of 6"):
            hard_top_k(draw(6), k)

    @pytest.mark.parametrize("lead", LEADS)
    def test_vq_keeps_the_length_and_takes_the_nearest_direction(self, lead):
        vq = DirectionalVQ(5, 7, Streams(0).generator("init", "vq")).double()
        vq.codebook = F.normalize(vq.codebook, dim=-1)  # once more, in float64
        h = draw(*lead, 5)
        out = vq(h)
        direction = F.normalize(out, dim=-1)
        assert torch.allclose(out.norm(dim=-1), h.norm(dim=-1), rtol=1e-12)
        cosines = F.normalize(h, dim=-1) @ vq.codebook.T
        assert torch.allclose((direction @ vq.codebook.T).max(-1).values, torch.ones(lead, dtype=torch.float64))
        assert torch.allclose((direction * F.normalize(h, dim=-1)).sum(-1), cosines.max(-1).values)
        assert torch.allclose(vq(out), out, rtol=1e-12)
        delta = draw(*lead, 5, seed=1, requires_grad=False)
        assert torch.equal(torch.autograd.grad(vq(h), h, delta)[0], delta)
        assert is_not_exact(vq, h)
        assert forward_mode_is_the_transpose(vq, h)
        assert not dict(vq.named_parameters())
        assert vq(torch.zeros(5, dtype=torch.float64)).norm() == 0

    @pytest.mark.parametrize("lead", LEADS)
    def test_the_subspace_is_an_orthogonal_projection(self, lead):
        subspace = FrozenSubspace(6, 2, Streams(0).generator("init", "subspace")).double()
        subspace.basis = torch.linalg.qr(subspace.basis).Q  # once more, in float64
        h = draw(*lead, 6)
        once = subspace(h)
        assert torch.allclose(subspace(once), once, rtol=1e-12)
        assert not torch.allclose(once, h, rtol=1e-2)
        assert torch.allclose(((h - once) * once).sum(-1), torch.zeros(lead, dtype=torch.float64), atol=1e-13)
        assert is_exact(subspace, h)
        assert torch.linalg.matrix_rank(subspace.basis @ subspace.basis.T) == 2

    def test_rank_equal_to_width_is_the_identity(self):
        subspace = FrozenSubspace(6, 6, Streams(0).generator("init", "subspace")).double()
        subspace.basis = torch.linalg.qr(subspace.basis).Q
        h = draw(3, 6)
        assert torch.allclose(subspace(h), h, rtol=1e-12)
