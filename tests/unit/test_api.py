"""The Python face."""

import importlib
import inspect
from pathlib import Path

import pytest

import heterodox as hx
from heterodox.app.export import describe_sparse, export_run, read_sparse
from heterodox.app.use import generate_run, probe_run, score_run
from tests.tiny import tiny_recipe


def test_every_name_is_there_and_stays_callable_after_its_modules_are_imported():
    for name in hx.__all__:
        assert callable(getattr(hx, name)), name
    importlib.import_module("heterodox.study.study")
    assert all(callable(getattr(hx, name)) for name in hx.__all__)


def test_train_and_compare_from_python(in_tmp):
    recipe = tiny_recipe(run={"budget": {"steps": 3}})
    run = hx.train(recipe, overrides=["run.budget.steps=2"])
    assert run.summary["steps"] == 2
    assert run.folder.name == "tiny-seed0"
    results = hx.compare([recipe], seeds=1, out="study")
    assert [row["status"] for row in results["runs"]] == ["finished"]
    assert (in_tmp / "study" / "report.html").exists()


PUBLIC = [getattr(hx, name) for name in hx.__all__]
PUBLIC += [export_run, generate_run, probe_run, score_run, read_sparse, describe_sparse]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_whoever_takes_a_path_takes_a_string(function):
    if inspect.isclass(function):
        function = function.__init__
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        said = str(parameter.annotation)
        assert "Path" not in said or "str" in said, f"{name}: {said}"


def test_paths_may_be_strings(in_tmp):
    recipe = tiny_recipe(run={"budget": {"steps": 2}})
    hx.train(recipe, out="run")
    assert hx.load_run("run").step == 2
    assert hx.write_report("run", "page.html") == Path("page.html")
    assert hx.write_report(["run"], "page.html").is_file()
    assert generate_run("run", "a", 3)
    assert probe_run("run")
    assert export_run("run", "safetensors", "weights") == Path("weights")
    assert score_run("run", "scores.parquet", split="val")["examples"]
    hx.load_recipe("run/recipe.yaml")
    for write in (lambda: hx.train(recipe, out=""), lambda: hx.load_run(""), lambda: hx.compare([recipe], out="")):
        with pytest.raises(hx.CheckpointError, match="a path is empty"):
            write()


def test_one_recipe_may_stand_for_a_list(in_tmp):
    recipe = tiny_recipe(run={"budget": {"steps": 2}})
    (in_tmp / "one.yaml").write_text(recipe.to_yaml())
    for source in (recipe, "one.yaml"):
        assert len(hx.compare(source, out="study")["runs"]) == 1
