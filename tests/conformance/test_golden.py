"""A refactoring leaves every loss as it was."""

import json

import pytest

from tests.conformance.golden import FILE, figures, recipes

KEPT = json.loads(FILE.read_text())
RECIPES = recipes()


def test_every_recipe_is_kept():
    assert set(RECIPES) == set(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_four_steps_are_what_they_were(name, tmp_path):
    """To nine digits, since processors add in different orders; FLOPs and bytes to the unit."""
    found, kept = figures(RECIPES[name], tmp_path / "run"), KEPT[name]
    assert len(set(kept["losses"])) == 4
    assert found["losses"] == pytest.approx(kept["losses"], rel=1e-9)
    for key in ("norms", "val"):
        assert found[key] == pytest.approx(kept[key], rel=1e-9)
    for key in ("test", "squares"):
        assert found[key] == pytest.approx(kept[key], rel=1e-9)
    assert found["weights"] == pytest.approx(kept["weights"], rel=1e-9, abs=1e-9)
    assert (found["flops"], found["activation_bytes"]) == (kept["flops"], kept["activation_bytes"])
