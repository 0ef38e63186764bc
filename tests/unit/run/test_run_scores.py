"""Scores of examples by a run, the index of the best, and training on that."""

import numpy as np
import pytest
from typer.testing import CliRunner

from heterodox.cli import app
from heterodox.core.comm import Solo
from heterodox.core.errors import CorpusError, RecipeError
from heterodox.data.scores import read_scores, write_scores
from heterodox.report import write_report
from heterodox.run.score_run import score_run
from heterodox.run.session import open_session
from heterodox.run.train import train
from tests.tiny import tiny_recipe
from tests.unit.run.test_run_data_rater import rater_recipe, user_recipe


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
