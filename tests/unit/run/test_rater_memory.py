"""What meta-training holds for its ways back is counted, wherever it happens."""

import pytest

from heterodox.app.plan import plan
from heterodox.app.session import open_session
from heterodox.app.train import train
from heterodox.core.comm import Solo
from heterodox.core.memory import measure_held_bytes
from heterodox.meta.cost import stored_bytes
from tests.saved import assert_same_bits, tensors
from tests.tiny import tiny_recipe
from tests.tiny_rater import LEARNER, rater_recipe, user_recipe

TRAIN = {key: value for key, value in LEARNER.items() if key != "name"} | {"rounds": 1, "population": 1}


def planned(recipe) -> int:
    return plan(recipe)["memory_bytes"]["activations"]


@pytest.mark.parametrize(
    "learner",
    [
        {},
        {"graphs": 0},
        {"graphs": 2, "backprop_steps": 4},
        {"micro_batch": 2},
        {"val_batch_size": 16},
        {"schedule": "all", "backprop_steps": 4},
        {"control": "detached"},
    ],
)
def test_a_whole_window_holds_what_is_told(learner):
    """Told from a shorter one; the states on the way, which are told apart, are small."""
    session = open_session(rater_recipe(learner), Solo(), "cpu")
    trainer, options = session.learner.trainer, session.learner.options
    told = session.learner.held_bytes(session.loader.next_batch())
    state = next(iter(trainer.population.states.values()))
    problem = trainer.population.problem
    while trainer.ticks < options.inner_steps - options.backprop_steps:
        trainer.step()
    given = [*problem.parameters, *problem.model.buffers(), *trainer.parameters]
    with measure_held_bytes(given) as held:
        trainer.step()
    states = stored_bytes(options, state.weights, 1)
    assert held.peak > 3 * states
    assert held.peak == pytest.approx(told - stored_bytes(options, state.weights, 3), abs=2 * states)


def test_the_learners_batches_count_and_not_those_that_it_scores():
    held = planned(rater_recipe())
    assert planned(rater_recipe(run={"batch_size": 8})) == held
    assert planned(rater_recipe({"batch_size": 8})) > 1.5 * held
    assert planned(rater_recipe({"graphs": 0})) < held


def test_a_run_that_trains_its_rater_is_charged_for_that(tmp_path):
    recipe = user_recipe({"train": TRAIN})
    summary = train(recipe, tmp_path / "run").summary
    plain = tiny_recipe(model=recipe.model.model_dump(), run=recipe.run.model_dump())
    assert summary["activation_bytes"] == planned(recipe) > 2 * planned(plain)
    assert planned(user_recipe({"train": TRAIN | {"batch_size": 8}})) > 1.5 * planned(recipe)
    assert train(plain, tmp_path / "plain").summary["activation_bytes"] == planned(plain)


def test_one_that_loads_it_is_not(trained_rater):
    recipe = user_recipe({"rater": str(trained_rater)})
    plain = tiny_recipe(model=recipe.model.model_dump(), run=recipe.run.model_dump())
    assert planned(recipe) == pytest.approx(planned(plain), rel=0.02)  # the ids of a larger batch


def test_finding_out_changes_nothing(tmp_path, monkeypatch):
    recipe = user_recipe({"train": TRAIN}, model={"dropout": 0.1})
    train(recipe, tmp_path / "run")
    monkeypatch.setattr("heterodox.learner.step.rated.rating_held_bytes", lambda *_: 0)
    train(recipe, tmp_path / "unmeasured")
    assert_same_bits(tensors(tmp_path / "run"), tensors(tmp_path / "unmeasured"))


def test_epochs_are_of_the_tokens_learned_from():
    foretold = plan(rater_recipe())
    split = foretold["corpus"]["tokens"]["train"]
    assert foretold["epochs"] == pytest.approx(foretold["tokens"] / split, rel=0.01)
    wider = plan(rater_recipe({"batch_size": 8}))
    assert wider["epochs"] == pytest.approx(2 * foretold["epochs"], rel=0.01)
    assert plan(rater_recipe(run={"batch_size": 8}))["epochs"] == foretold["epochs"]
