"""Scores of examples by a run, the index of the best, and training on that."""

import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner

from heterodox.app.session import open_session
from heterodox.app.train import train
from heterodox.app.use import score_run
from heterodox.cli.main import app
from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError, CorpusError, RecipeError
from heterodox.data import Windows
from heterodox.data.scores import KEY, read_scores, write_scores
from heterodox.report import write_report
from tests.saved import tensors
from tests.tiny import tiny_recipe
from tests.tiny_rater import LEARNER, rater_recipe, user_recipe

TRAIN = {key: value for key, value in LEARNER.items() if key != "name"} | {"rounds": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "run"
    train(rater_recipe({"lr": 0.05}), folder)
    return folder


def filtered(scores, keep=1.0, context=16, **sections):
    corruption = {"window": 16, "kinds": ["shuffled", "repeated"]}
    model = {"layers": 1, "heads": 1, "width": 8, "context": context}
    data = {"corruption": corruption, "filter": {"scores": str(scores), "keep": keep}}
    return tiny_recipe(data=data, model=model, **sections)


def test_scores_and_index_of_the_best(trained, tmp_path):
    out, index = tmp_path / "scores.parquet", tmp_path / "kept.parquet"
    answer = score_run(trained, out, keep=0.5, index=index)
    ids, scores, about = read_scores(out)
    assert scores is not None
    assert answer["examples"] == len(ids) == 1062
    assert about["split"] == "train"
    assert answer["auc"].keys() == answer["auc_surface"].keys() == {"shuffled", "repeated"}
    kept, nothing, _ = read_scores(index)
    assert nothing is None
    assert len(kept) == 531
    assert scores[kept].min() >= np.median(scores) > scores.min()
    for recipe in (filtered(index), filtered(out, keep=0.5)):
        loader = open_session(recipe, Solo(), "cpu").loader
        assert loader.examples_per_epoch == 531
        seen = np.concatenate([loader.next_batch().ids.numpy() for _ in range(60)])
        assert set(seen) <= set(kept)
    held_out = score_run(trained, out, split="val", noisy=True)
    assert held_out["examples"] == 62
    assert held_out["auc"].keys() == {"shuffled", "repeated"}
    with pytest.raises(CorpusError, match=r"scores of another split \(val, here train\)"):
        open_session(filtered(out), Solo(), "cpu")


def test_a_model_scores_by_likelihood_and_the_command_line_says_so(tmp_path):
    train(tiny_recipe(run={"budget": {"steps": 2}}), tmp_path / "run")
    answer = CliRunner().invoke(app, ["score", str(tmp_path / "run"), "--split", "val", "--out", str(tmp_path / "s")])
    assert answer.exit_code == 0, answer.output
    assert "62 examples of val" in answer.output
    scores = read_scores(tmp_path / "s")[1]
    assert scores is not None
    assert -3 < scores.mean() < -1
    with pytest.raises(RecipeError, match="the data section plants no noise"):
        score_run(tmp_path / "run", tmp_path / "s", split="val", noisy=True)
    with pytest.raises(RecipeError, match="needs both --keep and --index"):
        score_run(tmp_path / "run", tmp_path / "s", keep=0.5)
    with pytest.raises(RecipeError, match=r"--keep 1\.5 is no share"):
        score_run(tmp_path / "run", tmp_path / "s", keep=1.5, index=tmp_path / "i")


def test_a_rater_trained_for_the_run_s_own_rating_scores_and_can_be_used_elsewhere(tmp_path):
    """It is the one that stands in the checkpoint, not the model's likelihood."""
    run, out = tmp_path / "run", tmp_path / "scores.parquet"
    train(user_recipe({"train": TRAIN, "keep": 0.5}), run)
    score_run(run, out, split="val")
    scores = read_scores(out)[1]
    used = open_session(user_recipe({"rater": str(run), "keep": 0.5}), Solo(), "cpu").learner.rating
    weights = tensors(run)
    assert scores is not None
    assert scores.std() > 0
    for name, parameter in used.network.named_parameters():
        assert torch.equal(parameter, weights[f"state/learner/rating/rater/{name}"])
    windows = Windows(user_recipe({"rater": str(run)}).data.build().splits["val"], 16)
    assert np.allclose(scores, used.score(windows.batch(np.arange(62))).numpy(), rtol=1e-5)


def test_a_run_that_has_not_trained_its_rater_yet_has_none(tmp_path):
    run = tmp_path / "run"
    train(user_recipe({"train": TRAIN}), run)
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    with pytest.raises(CheckpointError, match="was stopped before it trained its rater; go on with --resume"):
        score_run(run, tmp_path / "scores.parquet")


def test_refuses_scores_of_other_examples(trained, tmp_path):
    """The text is the same in all of them, what is made of it is not."""
    index = tmp_path / "kept.parquet"
    score_run(trained, tmp_path / "scores.parquet", keep=0.5, index=index)
    noise = {"window": 16, "kinds": ["shuffled", "repeated"]}
    splits = {"train": 0.8, "meta": 0.1, "val": 0.05, "test": 0.05}
    for data, message in (
        ({"corruption": noise | {"seed": 1}}, r"another corruption\.seed \(0, here 1\)"),
        ({"corruption": noise | {"rate": 0.4}}, r"another corruption\.rate \(0\.3, here 0\.4\)"),
        ({"corruption": noise | {"kinds": ["shuffled"]}}, r'kinds \(\["shuffled", "repeated"\], here \["shuffled"\]\)'),
        ({"corruption": None}, r'another corruption \(\{"rate": 0\.3, .*\}, here none\)'),
        ({"corruption": noise, "splits": splits}, r"another splits\.train \(0\.85, here 0\.8\)"),
        ({"corruption": noise, "separator": " "}, r'another separator \("\\n\\n", here " "\)'),
        ({"corruption": noise, "tokenizer": "byte"}, r"another tokenizer \(\w{12}, here \w{12}\)"),
        ({"corruption": noise, "corpus": {"seed": 9}}, r"another corpus \(\w{12}, here \w{12}\)"),
    ):
        with pytest.raises(CorpusError, match=message):
            tiny_recipe(data={"filter": {"scores": str(index)}} | data).data.build()
    same = tiny_recipe(data={"filter": {"scores": str(index)}, "corruption": noise}).data.build()
    assert same.splits["train"].examples.ids.shape == (531,)


@pytest.mark.parametrize(
    ("ids", "scores", "keep", "context", "message"),
    [
        ([0, 1, 1], [1.0, 2.0, 3.0], 1.0, 16, "example_id 1 2 times"),
        ([0, -1], [1.0, 2.0], 1.0, 16, "example_id -1, expected 0 or more"),
        ([0, 99999], [1.0, 2.0], 1.0, 16, "has 1062 examples, so there is no example_id 99999"),
        ([0, 1], [1.0, np.nan], 1.0, 16, "no score for example_id 1"),
        ([0, 1], None, 0.5, 16, "no column score"),
        ([], [], 1.0, 16, "holds no example"),
        ([0, 1], [1.0, 2.0], 1.0, 8, "among windows of 8 tokens, but the model's context is 16"),
    ],
)
def test_refuses_scores(ids, scores, keep, context, message, tmp_path):
    scores = None if scores is None else np.array(scores, dtype=np.float64)
    write_scores(tmp_path / "s.parquet", np.array(ids, dtype=np.int64), scores, {"context": context})
    with pytest.raises(CorpusError, match=message):
        open_session(filtered(tmp_path / "s.parquet", keep), Solo(), "cpu")


TABLES = {
    "no ids": ({"score": [1.0]}, "has 0 columns example_id, expected one; its columns: score"),
    "ids of text": ({"example_id": ["a"]}, "a column example_id of string, expected whole numbers"),
    "gaps in ids": ({"example_id": [0, None]}, "1 rows without example_id"),
    "scores of text": ({"example_id": [0], "score": ["good"]}, "a column score of string, expected numbers"),
    "lists of scores": ({"example_id": [0], "score": [[1.0]]}, "a column score of list"),
    "gaps in scores": ({"example_id": [0, 1], "score": [None, 2.0]}, "1 rows without score"),
}


@pytest.mark.parametrize(("columns", "message"), TABLES.values(), ids=TABLES.keys())
def test_refuses_columns_of_another_kind(columns, message, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "s.parquet")
    with pytest.raises(CorpusError, match=message):
        read_scores(tmp_path / "s.parquet")


def test_refuses_what_is_there_twice_and_foreign_metadata(tmp_path):
    twice = pyarrow.Table.from_arrays([pyarrow.array([0]), pyarrow.array([1])], names=["example_id", "example_id"])
    pyarrow.parquet.write_table(twice, tmp_path / "s.parquet")
    with pytest.raises(CorpusError, match="has 2 columns example_id, expected one"):
        read_scores(tmp_path / "s.parquet")
    for text in (b"{", b"[]", b'{"context": "long"}'):
        table = pyarrow.table({"example_id": [0]}).replace_schema_metadata({KEY: text})
        pyarrow.parquet.write_table(table, tmp_path / "s.parquet")
        with pytest.raises(CorpusError, match=r"says in its metadata .* which no score file of ours does"):
            read_scores(tmp_path / "s.parquet")


def test_refuses_files_that_are_none(tmp_path):
    with pytest.raises(CorpusError, match="there is no file"):
        open_session(filtered(tmp_path / "s.parquet"), Solo(), "cpu")
    (tmp_path / "s.parquet").write_text("no parquet")
    with pytest.raises(CorpusError, match="is not a parquet file"):
        open_session(filtered(tmp_path / "s.parquet"), Solo(), "cpu")
    for keep in (0.0, 1.5):
        with pytest.raises(RecipeError, match="keep"):
            filtered(tmp_path / "s.parquet", keep)
        with pytest.raises(RecipeError, match="keep"):
            user_recipe({"rater": "somewhere", "keep": keep})


def test_the_report_shows_what_a_rater_tells_apart(trained, tmp_path):
    page = write_report([trained], tmp_path / "report.html").read_text()
    assert 'id="chart-auc"' in page
    assert 'id="chart-scores"' in page
    assert '"kind": "shuffled"' in page


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_another_text_is_read_by_the_runs_tokenizer(tokenizer, tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("".join(f"the {word} and " for word in ("quick", "brown", "fox", "jumps", "over")) * 400)
    second.write_text("an ox quits the hut jumps over the brook and " * 400)
    data = {"path": str(first), "tokenizer": {"name": tokenizer} | ({"vocab_size": 280} if tokenizer == "bpe" else {})}
    model = {"layers": 1, "heads": 1, "width": 8, "context": 16}
    recipe = tiny_recipe(data=data, model=model, run={"budget": {"steps": 2}, "sampling": {"tokens": 0}})
    train(recipe, tmp_path / "run")
    answer = score_run(tmp_path / "run", tmp_path / "scores.parquet", overrides=[f"data.path={second}"])
    assert answer["examples"] > 100
    plain = score_run(tmp_path / "run", tmp_path / "plain.parquet")
    assert plain["mean"] != answer["mean"]
    own = f"data.tokenizer.name={tokenizer}"
    with pytest.raises(RecipeError, match="another tokenizer"):
        score_run(tmp_path / "run", tmp_path / "no.parquet", overrides=[f"data.path={second}", own])
