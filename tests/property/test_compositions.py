"""Random combinations of parts of all slots: they run, or they are refused in one line before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from heterodox.app import catalog
from heterodox.app.recipe import SLOTS, merge
from heterodox.conformance.tiny import BASE
from heterodox.core.errors import RecipeError
from tests.command import heterodox, refused
from tests.conformance.compositions import TOPOLOGIES, compose, parts, sections_of, two_steps

Chosen = dict[str, str]

combinations = st.fixed_dictionaries({slot: st.sampled_from(parts(slot)) for slot in SLOTS})
few = settings(max_examples=14, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=150, derandomize=False)


def reason(chosen: Chosen) -> str | None:
    """Why the combination is refused, if it is; nothing is built for that."""
    try:
        compose(**chosen)
    except RecipeError as refusal:
        return str(refusal)
    return None


def check(chosen: Chosen) -> None:
    reports = two_steps(compose(**chosen))
    assert all(bool(report.loss.isfinite()) for report in reports)
    assert reports[1].cost.flops > 0
    assert float(reports[0].grad_norm) > 0


def drawn(how: settings, refusals: bool, test: Callable[[Chosen], None]) -> list[Chosen]:
    """Lets hypothesis draw combinations that are refused, or that are not, and hand them to `test`; each one once."""
    seen: list[Chosen] = []

    @how
    @given(chosen=combinations)
    def draw(chosen: Chosen) -> None:
        assume((reason(chosen) is not None) == refusals)
        if chosen not in seen:
            test(chosen)
            seen.append(chosen)

    draw()
    return seen


def are_various(seen: list[Chosen]) -> None:
    """Assert: at least ten, with several credit rules and updates, and more than one part of the other slots.

    But for the learner: `data_rater` goes with little; one combination of it is tested by itself.
    """
    assert len(seen) >= 10
    different = {slot: len({chosen[slot] for chosen in seen}) for slot in SLOTS if slot != "learner"}
    assert min(different.values()) > 1, different
    assert min(different["credit"], different["update"]) > 3, different


def are_refused(how: settings, folder: Path) -> list[Chosen]:
    """Combinations that `heterodox train` refused in one line with a reason, while nothing was written."""
    recipe = folder / "tiny.yaml"

    def refuse(chosen: Chosen) -> None:
        recipe.write_text(yaml.safe_dump(merge(BASE, sections_of(**chosen))))
        said = str(reason(chosen))
        refused(heterodox("train", recipe, "--out", folder / "run"), said)
        assert len(said.split()) > 5, "a reason is a sentence"
        assert list(folder.iterdir()) == [recipe]

    return drawn(how, True, refuse)


@pytest.mark.parametrize(
    "chosen",
    [
        {"credit": "direct_feedback", "update": "sparse sparsae"},
        {"credit": "sign_symmetry", "update": "sparse"},
        {"credit": "direct_feedback", "rating": "data_rater"},
        {"credit": "meta_critic", "update": "sparse"},
        {"credit": "equilibrium", "update": "sparse set"},
        {"learner": "data_rater", "model": "gpt"},
    ],
)
def test_what_the_recipes_compose_is_not_refused(chosen):
    check(chosen)


def test_combinations_that_are_not_refused_run():
    are_various(drawn(few, False, check))


def test_the_others_are_refused_before_anything_is_written(tmp_path):
    are_various(are_refused(few, tmp_path))


@pytest.mark.slow
def test_many_combinations_do(tmp_path):
    are_various(drawn(many, False, check))
    are_various(are_refused(many, tmp_path))


def test_all_topologies_are_drawn():
    assert TOPOLOGIES.keys() == catalog.SLOTS["topology"].own.keys()
    assert TOPOLOGIES["rigl"] == "sparse"
    assert TOPOLOGIES["sparsae"] == "sparse sparsae"
