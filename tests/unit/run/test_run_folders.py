"""Nothing is overwritten that a run did not write, and no run begins again in silence."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from heterodox.app.export import export_run
from heterodox.app.folder import PARTS
from heterodox.app.load import load_run
from heterodox.app.train import train
from heterodox.app.use import score_run
from heterodox.core.errors import CheckpointError
from heterodox.core.files import TEMPORARY
from heterodox.report import write_report
from heterodox.study.study import Study
from heterodox.study.sweep import Sweep
from tests.command import heterodox, recipe_file, refused
from tests.tiny import tiny_recipe

RUN = {"budget": {"steps": 2}, "eval_every": 1, "checkpoint_every": 1}
RECIPE = tiny_recipe(run=RUN)


def contents(folder: Path) -> dict[str, bytes | None]:
    found = {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return {name: content for name, content in found.items() if not name.endswith(".lock")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(RECIPE, tmp_path_factory.mktemp("trained") / "run").folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_files_of_our_names_without_a_recipe_are_left_alone(name, resume, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if "." in name:
        (out / name).write_text("mine")
    else:
        (out / name / "step-00000007").mkdir(parents=True)
        (out / name / "step-00000007" / "mine").write_text("mine")
    before = contents(out)
    with pytest.raises(CheckpointError, match=rf"holds {name}, but no recipe.yaml"):
        train(RECIPE, out, resume=resume)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("recipe.yaml", "no recipe.yaml"),
        ("checkpoints", "has no checkpoint"),
        ("metrics.jsonl", "no metrics.jsonl"),
        ("summary.json checkpoints", "has no checkpoint"),
        ("metrics.jsonl checkpoints", "has no checkpoint"),
    ],
)
def test_a_part_that_has_gone_missing_is_named(gone, said, run):
    for name in gone.split():
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    before = contents(run)
    with pytest.raises(CheckpointError, match=said):
        train(RECIPE, run, resume=True)
    assert contents(run) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins(run):
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(rows[0])
    assert train(RECIPE, run, resume=True).summary["status"] == "finished"


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_damaged_file_stops_a_resume_before_anything_is_lost(name, run):
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / name).write_text("[1]\n" + (run / name).read_text())
    before = contents(run)
    with pytest.raises(CheckpointError, match=name):
        train(RECIPE, run, resume=True)
    assert contents(run) == before


def test_what_interrupted_writes_left_is_cleared(run):
    left = [run / f".scores.json.dead{TEMPORARY}", run / "checkpoints" / f".step-00000009.dead{TEMPORARY}"]
    left[0].write_text("half")
    left[1].mkdir()
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    train(RECIPE, run, resume=True)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "score", "export", "report"])
def test_an_empty_out_is_refused(command, trained, in_tmp):
    about = trained if command in ("score", "export", "report") else recipe_file(in_tmp)
    before = contents(in_tmp)
    more = ("--search", "update.lr=1e-3,1e-2") if command == "sweep" else ()
    refused(heterodox(command, about, *more, "--out", ""), "a path is empty")
    assert contents(in_tmp) == before


@pytest.mark.parametrize("name", ["report.html", "results.json", "recipe.yaml", "runs/tiny/seed-0/metrics.jsonl"])
def test_a_comparison_leaves_alone_what_it_did_not_write(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError):
        Study([RECIPE], tmp_path, num_seeds=1).run()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"runs": 7}', '{"runs": [7]}', '{"format": 1}'])
def test_results_that_cannot_be_read_are_not_absent(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"results\.json"):
        Study([RECIPE], tmp_path, num_seeds=1).run()
    assert (tmp_path / "results.json").read_text() == text


@pytest.mark.parametrize("name", ["best/tiny.yaml", "sweep.json"])
def test_a_sweep_leaves_alone_what_it_did_not_write(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=name):
        Sweep([RECIPE], {"update.lr": [1e-3, 1e-2]}, tmp_path).run()
    assert (tmp_path / name).read_text() == "mine"


def test_scores_and_exports_replace_nothing_of_others(trained, tmp_path):
    mine = tmp_path / "mine.parquet"
    mine.write_text("mine")
    for out, index in ((mine, None), (tmp_path / "scores.parquet", mine)):
        with pytest.raises(CheckpointError, match="is there already"):
            score_run(trained, out, split="val", keep=None if index is None else 0.5, index=index)
    with pytest.raises(CheckpointError, match="already exists"):
        export_run(trained, "safetensors", mine)
    assert contents(tmp_path) == {str(mine): b"mine"}
    scores = tmp_path / "scores.parquet"
    assert score_run(trained, scores, split="val") == score_run(trained, scores, split="val")


@pytest.fixture
def nobody(tmp_path) -> Iterator[Path]:
    """A folder that this process may not enter."""
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield locked
    if root:
        os.seteuid(0)
    locked.chmod(0o700)


@pytest.mark.parametrize("resume", [False, True])
def test_no_permission_on_out(resume, nobody):
    for write in (
        lambda: train(RECIPE, nobody / "run", resume=resume),
        lambda: load_run(nobody / "run"),
        lambda: write_report(nobody / "run", nobody / "page.html"),
        lambda: export_run(nobody / "run", "safetensors", nobody / "weights"),
        lambda: score_run(nobody / "run", nobody / "scores"),
        lambda: Study([RECIPE], nobody / "study", num_seeds=1).run(),
        lambda: Sweep([RECIPE], {"update.lr": [1e-3, 1e-2]}, nobody / "sweep").run(),
    ):
        with pytest.raises(CheckpointError, match=r"cannot (read|write) .*: Permission denied"):
            write()


def test_a_name_that_no_folder_can_have(tmp_path):
    for name in ("n" * 256, "a\0b"):
        with pytest.raises(CheckpointError):
            train(RECIPE, tmp_path / name)
