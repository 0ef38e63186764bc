"""What a run that meta-trains a rater, or uses one, refuses before it begins."""

import pytest

from heterodox.app.plan import plan
from heterodox.app.recipe import Recipe
from heterodox.app.session import open_session
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from tests.tiny import tiny_recipe
from tests.tiny_rater import RUN, rater_recipe, user_recipe


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"learner": {"backprop_steps": 5}}, "backprop_steps 5 is longer than the 4 inner_steps"),
        ({"learner": {"weighting": {"kind": "softmax"}, "batch_size": 1}}, "softmax weights over a batch of one"),
        ({"credit": {"name": "head_only"}}, "learner data_rater needs credit backprop, found head_only"),
        ({"learner": {"slots": 3}}, "slots are for the schedule binomial"),
        ({"learner": {"lifetime": 2}}, "a lifetime of 2 steps is shorter"),
        ({"learner": {"rater": {"heads": 3}}}, "3 heads do not divide"),
        ({"learner": {"reset": "fresh"}}, "lifetime 6 is for the reset staggered only"),
        (
            {"learner": {"rater": {"view": 17}}},
            r"learner\.rater\.view is 17, but a window has the model's context of 16",
        ),
        (
            {"learner": {"eps_root": 1e-6}, "update": {"name": "sgd"}},
            r"learner\.eps_root 1e-06 is of AdamW, and update",
        ),
        ({"run": {"probe_every": 2}}, r"run\.probe_every 2 compares .* learner data_rater has no such signal"),
        ({"run": {"compile": True}}, "cannot be differentiated twice"),
        ({"model": {"straight_through_gelu": True}}, r"which model\.straight_through_gelu makes another than"),
    ],
)
def test_refuses(sections, message):
    with pytest.raises(RecipeError, match=message):
        rater_recipe(**sections)


@pytest.mark.parametrize("use", [lambda recipe: open_session(recipe, Solo(), "cpu"), plan], ids=["train", "plan"])
def test_refuses_what_only_the_corpus_shows(use):
    with pytest.raises(RecipeError, match=r"has 62 examples, but learner\.val_batches 1 of .* ask for 400 in a round"):
        use(rater_recipe({"val_batch_size": 400}))
    train = {"rounds": 1, "val_batches": 3, "val_batch_size": 40}
    wanted = r"rating\.train\.val_batches 3 of rating\.train\.val_batch_size 40 ask for 120"
    with pytest.raises(RecipeError, match=wanted):
        use(user_recipe({"train": train}))
    with pytest.raises(RecipeError, match=r"data\.corruption\.window is 16, but the model's context is 8"):
        use(rater_recipe(model={"context": 8}))


@pytest.mark.parametrize(
    ("rating", "run", "message"),
    [
        ({"mode": "reweight", "keep": 0.5}, {}, r"keep 0\.5 is for the mode filter only"),
        ({"mode": "reweight"}, {"batch_size": 1}, "weighs the examples of a batch, and run.batch_size is 1"),
    ],
)
def test_refuses_reweighting(rating, run, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(rating={"name": "data_rater", "rater": "runs/rater"} | rating, run=RUN | run)


def test_a_rater_trained_in_the_run_cannot_read_more_than_a_window():
    with pytest.raises(
        RecipeError, match=r"rating\.train\.rater\.view is 17, but a window has the model's context of 16"
    ):
        user_recipe({"train": {"rater": {"view": 17}}})
    assert user_recipe({"train": {"rater": {"view": 16}}}).rating.train.rater.view == 16


def test_a_resolved_recipe_is_a_recipe():
    for recipe in (rater_recipe(update={"name": "sgd"}), rater_recipe({"rater": {"layers": 0, "width": 18}})):
        assert Recipe.model_validate(recipe.dump()) == recipe
    for rating in ({"mode": "reweight"}, {"mode": "filter"}, {"keep": 0.5}):
        recipe = user_recipe({"train": {"reset": "fresh"}} | rating)
        assert Recipe.model_validate(recipe.dump()) == recipe
    assert user_recipe({"rater": "runs/rater"}).rating.drawn(7) == 10
