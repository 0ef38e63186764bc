"""What a credit rule remembers is the same after a look through the window, in float64."""

import pytest
import torch

from heterodox.core.comm import Solo
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, map_tensors, split
from heterodox.credit import FeedbackAlignment, MetaCritic
from heterodox.learner.step import Gradient
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from tests.tiny import tiny_batch, tiny_gpt
from tests.tiny_sparse import options, sparse_learner

EVENT = 3
RULES = {
    "meta_critic": MetaCritic.Config(critic_hidden=5, target_hidden=5),
    "grape": FeedbackAlignment.Config.model_validate({"grape": {"probes": 4}}),
}


def learner_of(rule: str, **search: object) -> Gradient:
    model = tiny_gpt()
    credit = RULES[rule].build(model, Streams(0))
    sparse = sparse_learner(options("sparsae", every=EVENT, **search), model=model)
    return Gradient(model, CrossEntropy(), Uniform(), credit, sparse.update, Solo())


def remembered(learner: Gradient) -> tuple[dict[str, torch.Tensor], Tree]:
    return split(map_tensors(learner.credit.state(), torch.clone))


def agree(one: tuple[dict[str, torch.Tensor], Tree], other: tuple[dict[str, torch.Tensor], Tree]) -> bool:
    return one[1] == other[1] and all(torch.equal(one[0][name], other[0][name]) for name in one[0].keys() | other[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_signal_of_the_window_leaves_no_trace_on_what_the_rule_remembers(rule, steps):
    """Before the first step too; the same signal without the window moves it."""
    learner = learner_of(rule, signal="micro_batch")
    for step in range(1, steps + 1):
        learner.step(tiny_batch(seed=step))
    before, batch = remembered(learner), tiny_batch(seed=9)
    window = learner.update.window
    _, grads = window.signal(batch, {})
    assert agree(before, remembered(learner))
    _, again = window.signal(batch, {})
    assert all(torch.equal(grads[name], again[name]) for name in grads)
    learner.credit.signal(learner.model, batch, torch.ones(4).double(), CrossEntropy())
    assert not agree(before, remembered(learner))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("judge", ["at_once", "look_ahead"])
def test_scoring_by_the_rules_own_signal_leaves_no_trace_on_what_it_remembers(rule, judge):
    """After a step that ends with an event the rule remembers what it does where nobody scores."""
    scoring = learner_of(rule, children=2, signal="micro_batch", judge=judge)
    alone = learner_of(rule, children=0)
    for step in range(1, EVENT + 1):
        events = [learner.step(tiny_batch(seed=step)).events for learner in (scoring, alone)]
    assert [sum(event["kind"] == "candidate" for event in found) for found in events] == [3, 0]
    assert not torch.equal(scoring.update.masks.flat, alone.update.masks.flat)
    assert agree(remembered(scoring), remembered(alone))
    for learner in (scoring, alone):
        learner.step(tiny_batch(seed=EVENT + 1))
    assert not agree(remembered(scoring), remembered(alone)), "degenerate: other weights are remembered alike"
