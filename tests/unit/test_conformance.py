"""The checks say no to rules that do what they must not, each for its own reason, and yes to those that are right."""

import json
from textwrap import dedent

import pytest

from heterodox.conformance import CHECKS, Violation, suite, tiny_recipe
from tests.command import heterodox
from tests.plugins import distribution, installed

BAD = dedent('''\
    """Feedback alignment, spoilt in one way each."""

    from dataclasses import replace
    from typing import Literal

    import torch

    from heterodox.core.rng import Streams
    from heterodox.core.state import restore
    from heterodox.credit import FeedbackAlignment


    class Liar(FeedbackAlignment):
        """Calls its feedback backprop."""

        def manifest(self, model):
            return dict.fromkeys(super().manifest(model), "backprop")


    class Cheap(FeedbackAlignment):
        """Forgets half of its FLOPs."""

        def signal(self, *given):
            signal = super().signal(*given)
            signal.cost = replace(signal.cost, flops=signal.cost.flops // 2)
            return signal


    class Restless(FeedbackAlignment):
        """Draws from the global random state, and keeps nothing of it."""

        def signal(self, *given):
            signal = super().signal(*given)
            signal.grads["head.weight"] += 1e-3 * torch.randn_like(signal.grads["head.weight"])
            return signal


    class Forgetful(FeedbackAlignment):
        """Leaves its matrices out of the checkpoint."""

        def state(self):
            return {"steps": 1}

        def load_state(self, tree):
            pass


    class Deaf(FeedbackAlignment):
        """Does not listen to the weights of the examples."""

        def signal(self, model, batch, weights, objective):
            return super().signal(model, batch, torch.ones_like(weights), objective)


    class Hasty(FeedbackAlignment):
        """Moves the weights by itself."""

        def signal(self, model, *given):
            signal = super().signal(model, *given)
            with torch.no_grad():
                model.head.weight.mul_(0.9)
            return signal


    class Buggy(FeedbackAlignment):
        """Does not run."""

        def signal(self, *given):
            raise LookupError("no such layer")


    class Idle(FeedbackAlignment):
        """Learns nothing."""

        def signal(self, *given):
            signal = super().signal(*given)
            signal.grads = {name: 0 * gradient for name, gradient in signal.grads.items()}
            return signal


    class Counting(FeedbackAlignment):
        """Lets its steps shrink, and does not remember how far it was."""

        steps = 0

        def signal(self, *given):
            signal = super().signal(*given)
            self.steps += 1
            signal.grads = {name: gradient / self.steps for name, gradient in signal.grads.items()}
            return signal


    class Coarse(FeedbackAlignment):
        """Reads the head's signal off what a small change of the head does."""

        def signal(self, model, batch, *given):
            signal = super().signal(model, batch, *given)
            with torch.no_grad():
                before, kept = model(batch.inputs), model.head.weight.clone()
                model.head.weight.mul_(1.001)
                change = (model(batch.inputs) - before).float().flatten(0, 1)
                model.head.weight.copy_(kept)
                signal.grads["head.weight"] = change.T @ model.features(batch.inputs).float().flatten(0, 1)
            return signal


    class Stubborn(FeedbackAlignment):
        """Has the same feedback at every seed."""


    class Averaging(FeedbackAlignment):
        """Does nothing wrong: it also follows the mean of a gradient, which begins at zero, and follows it alone."""

        mean = None

        def signal(self, *given):
            signal = super().signal(*given)
            self.mean += 0.1 * (signal.grads["head.weight"] - self.mean)
            return signal

        def state(self):
            return {"mean": {"head": self.mean}}

        def load_state(self, tree):
            restore({"head": self.mean}, tree.get("mean", {}), "mean")


    def _part(rule):
        title = rule.__name__.lower()

        class Config(FeedbackAlignment.Config):
            __annotations__ = {"name": Literal[title]}
            name = title

            def build(self, model, streams):
                found = rule(self.draw_all(model, Streams(0) if rule in (Stubborn, Averaging) else streams))
                found.mean = torch.zeros_like(model.head.weight)
                return found

        rule.Config = Config


    for _rule in (Liar, Cheap, Restless, Forgetful, Deaf, Hasty, Buggy, Idle, Counting, Coarse, Stubborn, Averaging):
        _part(_rule)
''')
CAUGHT = {
    "liar": ("tells_the_truth_in_its_manifest", "is called backprop, but is not the gradient"),
    "cheap": ("reports_its_costs", "FLOPs, PyTorch counts"),
    "restless": ("learns_and_repeats_itself", "two runs of one seed: "),
    "stubborn": ("remembers_what_it_needs", "two seeds drew the same numbers"),
    "forgetful": ("remembers_what_it_needs", "a state without its tensors is accepted"),
    "counting": ("resumes_to_the_same_bits", "a resumed run and a whole one: "),
    "deaf": ("weights_examples", "the loss is "),
    "hasty": ("leaves_the_weights_to_the_update", "the weights after a signal and before: 1 of "),
    "coarse": ("keeps_its_signal_in_bfloat16", "the cosine of head.weight in bfloat16 and in float32 is "),
    "idle": ("moves_all_but_the_frozen", "but moved: False"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    rules = {name: f"bad_rules:{name.capitalize()}" for name in [*CAUGHT, "buggy", "averaging"]}
    folder = distribution(tmp_path_factory.mktemp("bad"), {"bad_rules": BAD}, {"heterodox.credit": rules})
    with installed(folder):
        yield


def checked(check, credit, tmp_path):
    CHECKS[check](tiny_recipe(credit=credit, update={"name": "adamw", "lr": 1e-2}), tmp_path)


@pytest.mark.parametrize("credit", CAUGHT)
def test_a_rule_that_does_wrong_is_caught(bad, credit, tmp_path):
    check, words = CAUGHT[credit]
    with pytest.raises(Violation, match=words):
        checked(check, credit, tmp_path)


@pytest.mark.parametrize("check", ["remembers_what_it_needs", "resume_needs_the_rules_state"])
def test_a_rule_that_begins_alike_at_every_seed_is_right(bad, check, tmp_path):
    checked(check, "averaging", tmp_path)


def test_a_checkpoint_without_its_state_may_not_be_resumed(bad, tmp_path):
    with pytest.raises(Violation, match="and the run went on"):
        checked("resume_needs_the_rules_state", "forgetful", tmp_path)


def test_the_command_answers_with_what_is_wrong_and_why(bad, monkeypatch):
    monkeypatch.setattr(suite, "CHECKS", {name: CHECKS[name] for name in ("reports_its_costs", "weights_examples")})
    answer = heterodox("check", "credit=cheap", "--json")
    assert answer.code == 1
    costs, weights = json.loads(answer.out)
    assert "PyTorch counts" in costs["problem"]
    assert weights["problem"] is None
    assert "NO: the rule reports" in heterodox("check", "credit=cheap").out
    answer = heterodox("check", "credit=buggy")
    assert answer.code == 1
    assert "NO: LookupError: no such layer" in answer.out
    assert 'raise LookupError("no such layer")' in answer.err
    answer = heterodox("check", "credit=feedback_alignment", "update=sgd")
    assert answer.code == 0
    assert "NO" not in answer.out
