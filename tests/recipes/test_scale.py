"""The full-size recipes: what they would cost, and, by hand, three steps of each at its true width and depth.

pytest -m slow -n 0 -s tests/recipes/test_scale.py
"""

import json
import re
import sys
from pathlib import Path

import pytest

from heterodox.api import expand
from heterodox.app.plan import plan
from heterodox.app.recipe import load_recipe
from tests.command import answer_of, launch

FOLDER = Path(__file__).parents[2] / "recipes" / "scale"
RECIPES = expand([FOLDER])
MILLIONS = {
    "sparsae_125m": 125, "sparsae_350m": 349, "data_rater_12x512": 90, "meta_critic_wikitext": 134,
}  # fmt: skip
"""Parameters; all others are GPT-2 small, whose 124 M are 163 M with a head of its own."""
SMALL = {
    "data_rater": [
        "learner.inner_steps=2", "learner.backprop_steps=2", "learner.batch_size=2", "learner.micro_batch=1",
        "learner.val_batches=1", "learner.val_batch_size=1", "learner.inner_warmup=0", "learner.slots=2",
        "learner.rater.view=64",
    ],
    "sparse": [
        "update.topology.every=2", "update.topology.until=1", "update.topology.children=1",
        "update.topology.micro_batch=2", "update.topology.reset.batch=1", "update.burn_in.steps=0",
    ],
    "self_distillation": ["objective.warmup_steps=1"],
    "meta_critic": ["credit.meta_only_steps=1"],
}  # fmt: skip
"""What asks for less at the true size, by the name of a part."""


def offline(path: Path, text: Path) -> list[str]:
    """Overrides that leave the model as large as it is, but read `text` as bytes."""
    vocabulary = re.search(r"vocab_size=(\d+)", repr(load_recipe(path).data.tokenizer))
    assert vocabulary is not None
    return [f"data.path={text}", "data.tokenizer.name=byte", f"model.vocab_size={vocabulary[1]}"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 40_000)  # a meta split of 64 windows and more
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_plan_accounts_for_the_full_size(path, text):
    whole = ["learner.micro_batch=64"] if path.stem.startswith("data_rater") else []  # traced faster than eight pieces
    recipe = load_recipe(path, [*offline(path, text), *whole])
    planned = plan(recipe)
    assert round(planned["parameters"] / 1e6) == MILLIONS.get(path.stem, 163)
    sizes = planned["memory_bytes"]
    assert sizes["weights"] >= 4 * planned["parameters"]
    assert sizes["activations"] > sizes["weights"]
    assert sizes["total"] == sum(size for part, size in sizes.items() if part != "total")
    assert planned["tokens"] > 4.9e8
    assert planned["flops"] > 2 * planned["tokens"] * (
        planned["parameters"] - recipe.model.width * recipe.model.context
    )
    if recipe.update.name == "sparse":
        masked = planned["parameters"] - planned["active_parameters"]
        blocks = 12 * recipe.model.layers * recipe.model.width**2
        assert masked == pytest.approx(recipe.update.sparsity * blocks, rel=0.01)


def test_the_head_of_the_critics_recipe_says_how_many_windows_a_gpu_of_80_gb_should_be_given(text):
    """With room for what a plan leaves out; seed 1 draws stages that hold most."""
    path = FOLDER / "meta_critic_wikitext.yaml"
    assert "32 each" in path.read_text()
    for seed in (0, 1):
        sizes = plan(load_recipe(path, [*offline(path, text), "run.batch_size=32", f"seed={seed}"]))["memory_bytes"]
        assert 30e9 < sizes["total"] < 60e9
        assert sizes["loss_gradient"] == 2 * 4 * 32 * 1024 * 50_000


def three_steps(path: Path, text: Path) -> list[str]:
    """Overrides for a run of three short steps of the model as large as it is."""
    recipe = load_recipe(path, offline(path, text))
    names = {getattr(recipe, slot).name for slot in ("learner", "update", "objective", "credit")}
    less = [change for name in sorted(names) for change in SMALL.get(name, [])]
    short = ["run.budget.steps=3", "run.warmup_steps=0", "run.batch_size=2", "model.context=64", "run.eval_batches=1"]
    short += ["run.eval_batch_size=1", "run.device=cpu", "run.precision=float32", "run.sampling.tokens=0"]
    short += ["run.checkpoint_every=1000", "run.keep_checkpoints=1", "run.probe_every=null", "run.log_every=1"]
    return [*offline(path, text), *short, *less]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_three_steps_keep_the_model_as_large_as_it_is(path, text):
    whole, short = load_recipe(path, offline(path, text)), load_recipe(path, three_steps(path, text))
    assert short.model == whole.model.model_copy(update={"context": 64})
    assert short.run.budget.steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_three_steps_at_the_true_width_and_depth(path, text, tmp_path):
    overrides = three_steps(path, text)
    ended = answer_of(launch("train", path, *overrides, "--out", tmp_path / "run", "--json"), timeout=3600)
    assert ended.code == 0, ended.err
    summary = json.loads(ended.out)
    assert summary["status"] == "finished"
    assert summary["parameters"] == sum(
        entry["size"] for entry in json.loads((tmp_path / "run" / "manifest.json").read_text())["parameters"].values()
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 3
    assert losses[2] != losses[1]
    peak = summary["peak_memory_bytes"] / 1e9
    sys.stderr.write(f"{path.stem}: {summary['wall_seconds']:.0f} s, {peak:.1f} GB\n")
