"""`elsewhere: backprop`: exact under dropout too, and no pass where there is nothing to learn. float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.credit import Backprop, DirectFeedback, FeedbackAlignment, KolenPollack, SignSymmetry
from heterodox.credit.base import elsewhere_names
from heterodox.credit.feedback import linear_layers
from tests.signals import same, signal_of
from tests.tiny import tiny_gpt, tiny_recipe

RULES = {
    "feedback_alignment": FeedbackAlignment.Config(elsewhere="backprop"),
    "feedback_alignment grape": FeedbackAlignment.Config(elsewhere="backprop", grape={}),
    "sign_symmetry": SignSymmetry.Config(elsewhere="backprop"),
    "kolen_pollack": KolenPollack.Config(elsewhere="backprop"),
    "direct_feedback": DirectFeedback.Config(elsewhere="backprop"),
    "direct_feedback own": DirectFeedback.Config(elsewhere="backprop", route="own"),
}
every_rule = pytest.mark.parametrize("config", RULES.values(), ids=list(RULES))


def seeded(rule, model, seed: int = 0):
    """The signal with the dropout masks of this seed, and the random state that it leaves."""
    torch.manual_seed(seed)
    return signal_of(rule, model), torch.get_rng_state()


@every_rule
def test_it_is_exact_under_dropout_and_leaves_the_random_stream_as_one_pass_does(config):
    model = tiny_gpt(dropout=0.5).train()
    exact, left = seeded(Backprop(), model)
    found, also_left = seeded(config.build(model, Streams(0)), model)
    other, _ = seeded(Backprop(), model, seed=1)
    assert same(found.loss, exact.loss)
    names = elsewhere_names(model)
    assert {"tok_emb.weight", "blocks.0.ln1.weight", "ln_f.bias"} <= set(names)
    for name in names:
        assert exact.grads[name].norm() > 1e-6, name
        assert not same(other.grads[name], exact.grads[name]), "degenerate: the masks do not matter"
        assert same(found.grads[name], exact.grads[name]), name
    assert torch.equal(left, also_left)


@every_rule
def test_where_nothing_elsewhere_learns_there_is_no_second_pass(config):
    model = tiny_gpt()
    for name in elsewhere_names(model):
        model.get_parameter(name).requires_grad_(False)
    signals, counted = [], []
    for elsewhere in ("backprop", "frozen"):
        rule = config.model_copy(update={"elsewhere": elsewhere}).build(model, Streams(0))
        with FlopCounterMode(display=False) as counter:
            signals.append(signal_of(rule, model))
        counted.append(counter.get_total_flops())
    assert signals[0].cost == signals[1].cost
    assert counted[0] == counted[1] > 0
    assert {f"{name}.weight" for name in linear_layers(model)} <= signals[0].grads.keys() == signals[1].grads.keys()


@pytest.mark.parametrize("credit", ["feedback_alignment", "sign_symmetry", "kolen_pollack", "direct_feedback"])
def test_a_compiled_model_with_dropout_is_refused(credit):
    section = {"name": credit, "elsewhere": "backprop"} | ({"route": "own"} if credit == "direct_feedback" else {})
    with pytest.raises(RecipeError, match=rf"{credit} with credit\.elsewhere backprop .*model\.dropout is 0\.1"):
        tiny_recipe(credit=section, model={"dropout": 0.1}, run={"compile": True})
    for model, run in (({}, {"compile": True}), ({"dropout": 0.1}, {})):
        tiny_recipe(credit=section, model=model, run=run)
    tiny_recipe(credit=section | {"elsewhere": "local"}, model={"dropout": 0.1}, run={"compile": True})
