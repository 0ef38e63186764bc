"""What a run reads from outside is what it began with, or it does not go on."""

import json
import shutil

import numpy as np
import pytest

from heterodox.app.train import train
from heterodox.core.errors import CheckpointError
from heterodox.data.scores import write_scores
from heterodox.training.checkpoint import Checkpoints
from tests.tiny import tiny_recipe
from tests.tiny_rater import rater_recipe, user_recipe

SHORT = {"budget": {"steps": 4}, "checkpoint_every": 2, "eval_every": 2, "sampling": {"tokens": 0}}


def cut(recipe, folder):
    """A run of the recipe that was stopped in the middle."""
    train(recipe, folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    shutil.rmtree(checkpoints.folder / checkpoints.names()[-1])
    (folder / "summary.json").unlink()
    return folder


def with_tokenizer(tmp_path):
    """A recipe that names a tokenizer's file, and what replaces that by one of the same size."""
    file = tmp_path / "tokenizer.json"
    first = tiny_recipe().data.build().tokenizer.dumps()
    file.write_text(first)

    def change():
        described = json.loads(first)
        file.write_text(json.dumps(described | {"characters": described["characters"][::-1]}))

    return tiny_recipe(data={"tokenizer": {"name": "file", "path": str(file)}}, run=SHORT), change


def with_scores(tmp_path):
    file, ids = tmp_path / "scores.parquet", np.arange(200)
    write_scores(file, ids, ids / 200, {})
    recipe = tiny_recipe(data={"filter": {"scores": str(file), "keep": 0.5}}, run=SHORT)
    return recipe, lambda: write_scores(file, ids, -ids / 200, {})


def with_rater(tmp_path):
    """The rater's run goes on in between."""
    longer = [rater_recipe(run={"budget": {"steps": steps}}) for steps in (6, 9)]
    train(longer[0], tmp_path / "rater")
    recipe = user_recipe({"rater": str(tmp_path / "rater"), "keep": 0.5})
    return recipe, lambda: train(longer[1], tmp_path / "rater", resume=True)


INPUTS = {"data.tokenizer": with_tokenizer, "data.filter.scores": with_scores, "rating.rater": with_rater}


@pytest.mark.parametrize("key", INPUTS)
def test_an_input_that_has_changed_is_refused_and_nothing_is_overwritten(key, tmp_path):
    recipe, change = INPUTS[key](tmp_path)
    folder = cut(recipe, tmp_path / "run")
    tokenizer = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    shutil.copytree(folder, tmp_path / "same")
    assert train(recipe, tmp_path / "same", resume=True).summary["status"] == "finished"
    change()
    with pytest.raises(CheckpointError, match=rf"was trained with another {key} \(.*\): give the original {key}, or"):
        train(recipe, folder, resume=True)
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer
    assert not (folder / "summary.json").exists()


def test_a_checkpoint_from_before_inputs_were_noted_goes_on(tmp_path):
    recipe, _ = with_scores(tmp_path)
    folder = cut(recipe, tmp_path / "run")
    checkpoints = Checkpoints(folder / "checkpoints")
    model, state, values = checkpoints.load()
    assert values.pop("inputs").keys() == {"data.tokenizer", "data.filter.scores"}
    checkpoints.save(values["progress"]["step"], model, state, values)
    assert train(recipe, folder, resume=True).summary["status"] == "finished"
