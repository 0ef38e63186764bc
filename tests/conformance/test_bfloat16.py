"""Under `run.precision: bfloat16` every rule's signal is that of float32, or the recipe is refused."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from heterodox.conformance.one_signal import ALONE, changed
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.types import Signal
from heterodox.objective import CrossEntropy
from heterodox.run.session import build_learner, build_model, open_session
from tests.conformance.combinations import OWN_MODELS, RULES, sections_of
from tests.tiny import tiny_batch, tiny_recipe
from tests.tiny_rater import SMALL, rater_recipe, user_recipe

SIZE = {"width": 64, "heads": 4, "context": 32}
VOCABULARY, EXAMPLES = 64, 8
REFUSED = {"equilibrium", "bptt", "implicit"}


def signal_of(rule: str, precision: str) -> Signal:
    """The rule's first signal on a model of which no layer is nearly linear."""
    sections = sections_of(rule, "adamw")
    sections["model"] = OWN_MODELS.get(rule, {}) | SIZE
    recipe = changed(tiny_recipe(**sections), **ALONE, run={"precision": precision})
    model = build_model(recipe, VOCABULARY, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    learner = build_learner(recipe, model, Solo())
    batch = tiny_batch(EXAMPLES, SIZE["context"], VOCABULARY)
    return learner.credit.signal(model, batch, torch.ones(EXAMPLES), CrossEntropy())


@pytest.mark.parametrize("rule", RULES)
def test_the_signal_is_that_of_float32_or_refused(rule):
    exact = signal_of(rule, "float32").grads
    if rule in REFUSED:
        with pytest.raises(RecipeError, match=r"run\.precision float32"):
            signal_of(rule, "bfloat16")
        return
    found = signal_of(rule, "bfloat16").grads
    assert exact.keys() == found.keys()
    cosines = [
        float(cosine_similarity(found[name].flatten().double(), gradient.flatten().double(), dim=0))
        for name, gradient in exact.items()
        if gradient.norm() > 0
    ]
    assert len(cosines) >= 2
    assert min(cosines) > 0.99


def test_bfloat16_is_another_computation():
    """Else the test above would compare a thing with itself."""
    assert float(signal_of("backprop", "float32").loss) != float(signal_of("backprop", "bfloat16").loss)


TRAIN = {
    "rater": SMALL, "rounds": 2, "population": 1, "inner_steps": 3, "backprop_steps": 2, "batch_size": 4,
    "val_batches": 1, "val_batch_size": 4,
}  # fmt: skip


def test_meta_gradients_are_in_float32_whatever_the_precision():
    """To the bit: neither inner models, nor their optimizer, nor the adjoint knows of the run's bfloat16."""
    raters, learners = [], []
    for precision in ("float32", "bfloat16"):
        run = {"precision": precision}
        recipe = changed(user_recipe({"train": TRAIN}), run=run)
        rating = open_session(recipe, Solo(), "cpu").learner.rating
        while rating.prepare():
            pass
        raters.append(dict(rating.network.named_parameters()))
        session = open_session(changed(rater_recipe(), run=run), Solo(), "cpu")
        for _ in range(3):
            session.learner.step(session.loader.next_batch())
        learners.append(session.learner.trainer.average)
        assert session.model.autocast_dtype is (torch.bfloat16 if precision == "bfloat16" else None)
    for name, weight in raters[0].items():
        assert torch.equal(weight, raters[1][name]), name
    assert torch.equal(learners[0], learners[1])


def test_manifest_and_plan_say_what_stays_in_float32(tmp_path):
    recipe = changed(user_recipe({"train": TRAIN}), run={"precision": "bfloat16"})
    assert recipe.in_float32() == ["the inner models of rating.train and the meta-gradient"]
    manifest = open_session(recipe, Solo(), "cpu").manifest()
    assert (
        "the inner models of rating.train and the meta-gradient: in float32, though run.precision is bfloat16"
        in (manifest["remarks"])
    )
    assert changed(recipe, run={"precision": "float32"}).in_float32() == []
