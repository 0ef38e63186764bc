"""What MCL-DSUP proposes: its structure as declared, and that weights move by it through the update, in float64."""

import pytest
import torch

from heterodox.core.comm import Solo
from heterodox.learner import Gradient
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from heterodox.update import SGD
from tests.meta_critic import rule_of
from tests.signals import same, signal_of
from tests.tiny import tiny_batch, tiny_gpt


def test_a_weights_change_is_what_the_update_makes_of_its_proposal():
    model = tiny_gpt()
    rule = rule_of(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = rule.state()["critics"]
    state = {name: tensor.clone() for name, tensor in state.items()}
    Gradient(model, CrossEntropy(), Uniform(), rule, SGD(lr=0.5), Solo(), clip=None).step(tiny_batch())
    assert any(not torch.equal(state[name], tensor) for name, tensor in rule.state()["critics"].items())
    again = tiny_gpt()
    same_rule = rule_of(again)
    signal = same_rule.signal(again, tiny_batch(), torch.ones(4), CrossEntropy())
    assert signal.grads.keys() == before.keys()
    for name, proposal in signal.grads.items():
        assert same(model.state_dict()[name], before[name] - 0.5 * proposal), name
        assert proposal.norm() > 0
    for model_parameter in [*model.parameters(), *rule.proposals.critics.parameters()]:
        assert model_parameter.grad is None
        assert model_parameter.requires_grad


def ranks(found: dict[str, torch.Tensor]) -> dict[str, int]:
    return {n: int(torch.linalg.matrix_rank(g)) for n, g in found.items() if g.ndim == 2 and n.startswith("blocks")}


@pytest.mark.parametrize(("rank", "density", "expected"), [(3, 1.0, 3), (4, 0.5, 2), (5, 0.2, 1)])
def test_a_low_rank_proposal_has_the_rank_that_it_declares(rank, density, expected):
    rule = rule_of(tiny_gpt(), structure="low_rank", rank=rank, density=density)
    found = ranks(signal_of(rule, tiny_gpt()).grads)
    assert len(found) == 12
    assert set(found.values()) == {expected}


@pytest.mark.parametrize("density", [0.03, 0.25, 1.0])
def test_an_elementwise_proposal_has_as_many_entries_as_it_declares(density):
    rule = rule_of(tiny_gpt(), structure="elementwise", density=density)
    for name, proposal in signal_of(rule, tiny_gpt()).grads.items():
        if proposal.ndim == 2 and name != "head.weight":
            assert int(proposal.count_nonzero()) == int(density * proposal.numel()), name


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_a_block_proposal_has_as_many_tiles_as_it_declares(density):
    rule = rule_of(tiny_gpt(), structure="block", block=4, density=density, embeddings="frozen")
    for name, proposal in signal_of(rule, tiny_gpt()).grads.items():
        if proposal.ndim == 2 and name != "head.weight":
            tiles = proposal.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).abs().sum((1, 3))
            assert int((tiles > 0).sum()) == int(density * tiles.numel()), name
            assert int(proposal.count_nonzero()) == 16 * int(density * tiles.numel()), name


def test_an_outer_proposal_has_as_many_rank_one_terms_as_tokens_it_keeps():
    """One of six tokens in each of four examples. Keys and values learn behind attention, which spreads an error."""
    rule = rule_of(tiny_gpt(), density=0.2)
    found = ranks(signal_of(rule, tiny_gpt()).grads)
    own = {n: rank for n, rank in found.items() if "attn.k" not in n and "attn.v" not in n}
    assert set(own.values()) == {4}
    assert max(ranks(signal_of(rule_of(tiny_gpt()), tiny_gpt()).grads).values()) == 8
