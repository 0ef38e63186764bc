"""The small networks of MCL-DSUP by their formulas, and what MLP_G is told."""

import pytest
import torch
import torch.nn.functional as F

from heterodox.core.comm import Solo
from heterodox.credit.meta_critic.forward import look, main_forward, token_losses
from heterodox.credit.meta_critic.networks import Network
from heterodox.objective import CrossEntropy
from tests.meta_critic import meta_of, rule_of
from tests.signals import WEIGHTS, same
from tests.tiny import tiny_batch, tiny_gpt


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(form, **options) -> Network:
    generator = torch.Generator().manual_seed(1)
    net = Network(5, 4, 7, 3, form=form, generator=generator, like=drawn(1), **{"linear": True} | options)
    with torch.no_grad():
        net.bias.copy_(drawn(7, seed=2))
    return net


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("form", ["gated", "mlp"])
def test_a_network_is_its_formula(form, linear):
    net, c, s, size = network(form, linear=linear), drawn(2, 6, 5), drawn(2, 6, 4, seed=3), drawn(2, 6, 1, seed=4).exp()
    u, v, o = net.context, net.signal, net.output
    inner = F.gelu(c @ u.T + net.bias) * (s @ v.T) if form == "gated" else F.gelu(c @ u.T + s @ v.T + net.bias)
    straight = s @ net.linear.T if linear else 0.0
    assert same(net(c, s, size), size * (inner @ o.T + straight))
    assert same(net(c, s), inner @ o.T + straight)
    assert same(net(c, s, size, mean=True), net(c, s, size).mean((0, 1)))
    assert not torch.allclose(net(c, s, size), net(c, s), atol=1e-2)


def test_shared_critics_know_the_block_that_they_speak_for():
    """By its id alone: of two blocks that see the same they say different things, until the ids are the same."""
    rule = rule_of(tiny_gpt(), shared=True)
    critics, stages = rule.proposals.critics, {stage.index: stage for stage in rule.proposals.stages}
    assert critics.ids is not None

    def said(index: int) -> dict[str, torch.Tensor]:
        found = critics.outputs(stages[index], drawn(4, 6, 8), drawn(4, 6, 8, seed=3), drawn(4, 6, 1), mean=False)
        return {slot.partition(f"blocks.{index}.")[2]: y.detach() for slot, y in found.items()}

    low, high = said(0), said(1)
    assert low.keys() == high.keys()
    assert all(not torch.allclose(low[slot], high[slot], atol=1e-3) for slot in low)
    with torch.no_grad():
        critics.ids[1] = critics.ids[0]
    assert all(same(low[slot], said(1)[slot]) for slot in low)


def test_what_the_target_network_is_told():
    model, objective, batch = tiny_gpt(), CrossEntropy(), tiny_batch()
    seen = main_forward(model, batch, WEIGHTS, objective, ())
    losses = F.cross_entropy(seen.logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(4, 6)
    hidden = model.features(batch.inputs).detach()
    normal = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert same(token_losses(seen, objective), losses)

    token = look("token", seen, objective, Solo(), torch.float64)
    assert torch.allclose(token.context, torch.cat([normal, losses[..., None]], -1), rtol=1e-9)
    assert torch.equal(token.size.flatten(), WEIGHTS)

    pooled = look("pooled", seen, objective, Solo(), torch.float64)
    mean = (normal * WEIGHTS[:, None, None]).mean((0, 1))
    assert torch.allclose(pooled.context.flatten(), torch.cat([mean, seen.loss[None]]), rtol=1e-9)
    assert pooled.signal is None

    error = look("error", seen, objective, Solo(), torch.float64)
    assert error.signal is not None
    assert torch.allclose(error.signal.square().mean(-1), torch.ones(4, 6, dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(error.signal * error.size, seen.error * 24, rtol=1e-9)
    assert torch.allclose(error.context, normal, rtol=1e-9)
    assert float(seen.error.norm()) > 0


def test_frozen_embeddings_need_no_transport_past_the_first_block():
    """Every parameter that there is gets a gradient, and the others are as they would have been."""
    model = tiny_gpt()
    rule, whole = (rule_of(model, transport="attention", embeddings=how) for how in ("frozen", "critic"))
    own, other = rule.proposals.critics.transport, whole.proposals.critics.transport
    assert own is not None
    assert other is not None
    assert (own.blocks, other.blocks) == ([1], [1, 0])
    assert set(own.state_dict()) == {"inward.1", "outward.1"}
    assert torch.equal(own.inward["1"], other.inward["1"])
    gradient = meta_of(rule, model).gradient
    assert gradient.keys() == dict(rule.proposals.critics.named_parameters()).keys()
    assert min(float(g.norm()) for g in gradient.values()) > 0
