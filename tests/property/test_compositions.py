"""Random combinations of parts of all slots: refused with a reason, or they run."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heterodox import catalog
from heterodox.core.errors import RecipeError
from heterodox.recipe import SLOTS
from tests.conformance.compositions import TOPOLOGIES, compose, parts, two_steps

combinations = given(chosen=st.fixed_dictionaries({slot: st.sampled_from(parts(slot)) for slot in SLOTS}))
few = settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=300, derandomize=False)


def check(chosen: dict[str, str]) -> None:
    try:
        recipe, reason = compose(**chosen), None
    except RecipeError as refusal:
        recipe, reason = None, str(refusal)
    if recipe is None:
        assert reason is not None
        assert len(reason.split()) > 5, "a reason is a sentence"
        return
    reports = two_steps(recipe)
    assert all(bool(report.loss.isfinite()) for report in reports)
    assert reports[1].cost.flops > 0
    assert float(reports[0].grad_norm) > 0


@pytest.mark.parametrize(
    "chosen",
    [
        {"credit": "direct_feedback", "update": "sparse sparsae"},
        {"credit": "sign_symmetry", "update": "sparse"},
        {"credit": "direct_feedback", "rating": "data_rater"},
        {"credit": "meta_critic", "update": "sparse"},
        {"credit": "equilibrium", "update": "sparse set"},
    ],
)
def test_what_the_recipes_compose_is_not_refused(chosen):
    compose(**chosen)
    check(chosen)


@few
@combinations
def test_a_combination_runs_or_is_refused_with_a_reason(chosen):
    check(chosen)


@pytest.mark.slow
@many
@combinations
def test_many_combinations_do(chosen):
    check(chosen)


def test_all_topologies_are_drawn():
    assert TOPOLOGIES.keys() == catalog.SLOTS["topology"].own.keys()
    assert TOPOLOGIES["rigl"] == "sparse"
    assert TOPOLOGIES["sparsae"] == "sparse sparsae"
