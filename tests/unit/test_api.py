"""The Python face."""

import importlib

import heterodox as hx
from tests.tiny import tiny_recipe


def test_every_name_is_there_and_stays_callable_after_its_modules_are_imported():
    for name in hx.__all__:
        assert callable(getattr(hx, name)), name
    importlib.import_module("heterodox.comparison.study")
    assert all(callable(getattr(hx, name)) for name in hx.__all__)


def test_train_and_compare_from_python(in_tmp):
    recipe = tiny_recipe(run={"budget": {"steps": 3}})
    run = hx.train(recipe, overrides=["run.budget.steps=2"])
    assert run.summary["steps"] == 2
    assert run.folder.name == "tiny-seed0"
    results = hx.compare([recipe], seeds=1, out="study")
    assert [row["status"] for row in results["runs"]] == ["finished"]
    assert (in_tmp / "study" / "report.html").exists()
