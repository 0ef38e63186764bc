"""Plans hold: the kept studies spent what `heterodox plan` says of their recipes, to the FLOP."""

import json
import string
from pathlib import Path

import pytest

from heterodox.app.plan import plan
from heterodox.app.recipe import load_recipe

RESULTS = Path(__file__).parents[2] / "results"
STUDIES = ["shakespeare", "shakespeare_flops", "equilibrium", "data_rater", "sparse_90"]
UNTIL_CONVERGED = {"implicit"}
"""Their solver stops when it has converged, which a plan cannot know: it counts the most that is allowed."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As long as tiny Shakespeare, in as many characters."""
    alphabet = (string.ascii_letters + string.punctuation)[:64] + "\n"
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((alphabet * 20_000)[:1_115_394])
    return path


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_spent_what_was_planned(study, text):
    results = json.loads((RESULTS / study / "results.json").read_text())
    resolved = {entry["name"]: entry["resolved"] for entry in results["recipes"]}
    assert results["corpus"]["vocab_size"] == 65
    for run in results["runs"]:
        name = run["recipe"]
        if name in resolved:
            planned = plan(load_recipe(resolved.pop(name), [f"data.path={text}"]))
            if name in UNTIL_CONVERGED:
                assert planned["flops"] > run["flops"]
            else:
                assert (name, planned["flops"], planned["tokens"]) == (name, run["flops"], run["tokens"])
    assert not resolved
