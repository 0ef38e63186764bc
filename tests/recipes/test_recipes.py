"""Every recipe in the repository can be read, and trains."""

import re
import string
from pathlib import Path

import pytest

from heterodox.api import expand, quick_recipes
from heterodox.app.plan import plan
from heterodox.app.recipe import load_recipe
from heterodox.app.train import train
from heterodox.study.study import Study
from heterodox.training.config import RunConfig

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path for path in ROOT.rglob("*.yaml") if not path.name.startswith("_"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_reads_and_trains_three_steps(path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 1200)
    smaller = ["model.layers=1", "model.width=32", "run.batch_size=2", "run.eval_batches=1", "run.device=cpu"]
    short = ["run.budget.steps=3", "run.warmup_steps=0", "run.probe_every=2", "run.sampling.tokens=4"]
    if path.parent.name == "scale":
        smaller += ["data.tokenizer.name=byte", "model.heads=4", "model.context=32"]
    changed = load_recipe(path, [f"data.path={text}"])
    if changed.update.name == "sparse":
        short += ["update.burn_in.steps=0"]
        if changed.update.topology.name != "static":
            short += ["update.topology.every=1", "update.topology.start=0", "update.topology.until=1"]
        if changed.update.topology.name == "sparsae":
            short += ["update.topology.mutation=0.1"]
    if changed.learner.name == "data_rater":
        short += ["run.probe_every=null"]
        if path.parent.name == "scale":
            short += ["learner.rater.view=16", "learner.inner_steps=4", "learner.backprop_steps=4", "learner.slots=2"]
            short += ["learner.batch_size=2", "learner.micro_batch=1", "learner.inner_warmup=0"]
            short += ["learner.val_batches=1", "learner.val_batch_size=2"]
    if changed.credit.name == "meta_critic":
        short += ["credit.meta_only_steps=1"]
    if changed.objective.name == "self_distillation":
        short += ["objective.warmup_steps=1"]
    recipe = load_recipe(path, [f"data.path={text}", *smaller, *short])
    if recipe.rating.name == "data_rater":
        short.append("rating.train.rounds=1")
        recipe = load_recipe(path, [f"data.path={text}", *smaller, *short])
    assert recipe.name == path.stem
    assert recipe.description
    run = train(recipe, tmp_path / "run")
    assert run.summary["status"] == "finished"
    assert run.summary["credit"] == recipe.credit.name


@pytest.mark.parametrize("folder", ["quick", "shakespeare", "compositions"])
def test_a_comparison_holds_the_ceiling_and_the_floor_and_differs_in_the_rule_alone(folder):
    recipes = [load_recipe(path, ["data.path=text.txt"]) for path in expand([ROOT / folder])]
    assert {"backprop", "head_only"} <= {recipe.credit.name for recipe in recipes}
    without = {
        "data": True,
        "learner": True,
        "run": {field for field in RunConfig.model_fields if field != "warmup_steps"},
    }
    alone = [recipe.model_dump(include=without) for recipe in recipes]
    assert all(sections == alone[0] for sections in alone)
    at_home = [recipe for recipe in recipes if recipe.credit.name != "equilibrium"]
    assert all(recipe.model == recipes[0].model for recipe in at_home)
    assert {recipe.objective.name for recipe in recipes if "sparsae" not in recipe.name} == {"cross_entropy"}


def test_the_quick_comparison_has_every_family():
    recipes = [load_recipe(path) for path in expand([ROOT / "quick"])]
    assert {"sign_symmetry", "feedback_alignment", "direct_feedback", "equilibrium", "meta_critic"} <= {
        recipe.credit.name for recipe in recipes
    }
    assert {"rigl", "sparsae"} == {recipe.update.topology.name for recipe in recipes if recipe.update.name == "sparse"}
    raters = [recipe.rating for recipe in recipes if recipe.rating.name == "data_rater"]
    assert len(raters) == 1
    assert raters[0].train is not None


def test_a_composition_stands_beside_its_partners():
    recipes = {recipe.name: recipe for recipe in map(load_recipe, expand([ROOT / "compositions"]))}
    pairs = {
        "direct_feedback_sparsae": ("direct_feedback", "sparsae"),
        "sign_symmetry_rigl": ("sign_symmetry", "rigl"),
        "direct_feedback_data_rater": ("direct_feedback", "data_rater"),
        "meta_critic_rigl": ("meta_critic", "rigl"),
    }
    for name, (rule, other) in pairs.items():
        both, first, second = recipes[name], recipes[rule], recipes[other]
        assert both.credit == first.credit
        assert (both.rating, both.objective) == (second.rating, second.objective)
        assert both.update.name == second.update.name
    sparse = recipes["equilibrium_set"]
    assert (sparse.model, sparse.credit) == (recipes["equilibrium"].model, recipes["equilibrium"].credit)
    assert sparse.update.around == recipes["equilibrium"].update


def sparse_cost(recipe) -> float:
    """Windows that a run passes forward; a backward pass counts as two."""
    steps, search = recipe.run.budget.steps, recipe.update.topology
    windows = 3.0 * steps * recipe.run.batch_size
    if recipe.objective.name == "self_distillation":
        windows += (steps - recipe.objective.warmup_steps) * recipe.run.batch_size
    if search.name == "sparsae":
        passes = 1 if search.signal == "training" and search.judge == "look_ahead" else 3
        event = passes * search.micro_batch * (1 + search.children) + search.reset.batch
        windows += search.num_events(steps) * event
    return windows


PHASES = ["meta_only_steps"]
"""Options of a rule that divide its run, in steps."""


def test_the_comparison_at_equal_flops_is_that_of_equal_tokens_with_other_budgets(tmp_path):
    """And with warm-ups and phases that are the same share of them. Of a vocabulary as large as tiny Shakespeare's."""
    text = tmp_path / "text.txt"
    text.write_text(string.printable[:65] * 3000)
    plain, equal = (
        {
            recipe.name: recipe
            for recipe in (load_recipe(path, [f"data.path={text}"]) for path in expand([ROOT / folder]))
        }
        for folder in ("shakespeare", "shakespeare_flops")
    )
    assert plain.keys() == equal.keys()
    steps = {name: recipe.run.budget.steps for name, recipe in equal.items()}
    spent = {name: plan(recipe)["flops"] for name, recipe in equal.items()}
    assert max(spent.values()) < 1.001 * min(spent.values()), spent
    assert len(set(steps.values())) >= 6
    for name, recipe in plain.items():
        again, scale = equal[name], steps[name] / recipe.run.budget.steps
        assert again.run.warmup_steps == pytest.approx(scale * recipe.run.warmup_steps, abs=1)
        phases = {key: getattr(again.credit, key) for key in PHASES if hasattr(again.credit, key)}
        for key, value in phases.items():
            assert value == pytest.approx(scale * getattr(recipe.credit, key), abs=1)
        kept = {key: getattr(recipe.credit, key) for key in phases}
        run = {"budget": recipe.run.budget, "warmup_steps": recipe.run.warmup_steps}
        assert again.run.model_copy(update=run) == recipe.run
        assert again.model_copy(update={"run": recipe.run, "credit": again.credit.model_copy(update=kept)}) == recipe


@pytest.mark.parametrize("folder", ["sparse", "sparse_90", "sparse_ablations", "sparse_90_ablations"])
def test_sparse_methods_spend_equally(folder):
    recipes = [load_recipe(path, ["data.path=text.txt"]) for path in expand([ROOT / folder])]
    costs = {recipe.name: sparse_cost(recipe) for recipe in recipes if recipe.update.name == "sparse"}
    assert len(costs) >= 6
    assert max(costs.values()) < 1.001 * min(costs.values()), costs
    assert (len({recipe.run.budget.steps for recipe in recipes}) > 3) == folder.endswith("ablations")


def test_the_ladder_is_measured_from_plain_backprop(tmp_path):
    study = Study([load_recipe(path) for path in expand([ROOT / "local"])], tmp_path, num_seeds=1)
    assert study.baseline == "backprop"
    assert sum(recipe.credit.name == "backprop" for recipe in study.recipes) > 10


def test_compare_finds_its_recipes():
    assert quick_recipes().samefile(ROOT / "quick")


def test_tuned_recipes_record_an_equal_search():
    recipes = [load_recipe(path, ["data.path=text.txt"]) for path in expand([ROOT / "shakespeare"])]
    alike = [r for r in recipes if r.update.name == "adamw" and r.credit.name not in ("equilibrium", "meta_critic")]
    assert len(alike) >= 10
    for recipe in alike:
        assert recipe.tuning is not None, recipe.name
        grid = recipe.tuning.searched["update.lr"]
        assert grid == [1e-3, 3e-3, 6e-3]
        assert recipe.tuning.trials == len(grid)
        losses = [float(word) for word in re.findall(r"\d\.\d{3}", recipe.tuning.note)[: len(grid)]]
        assert recipe.update.lr == grid[losses.index(min(losses))], recipe.name


@pytest.mark.parametrize("folder", ["shakespeare", "sparse"])
def test_tuned_recipes_say_how(folder):
    for path in expand([ROOT / folder]):
        recipe = load_recipe(path, ["data.path=text.txt"])
        assert recipe.tuning is not None, path
        assert recipe.update.lr in recipe.tuning.searched["update.lr"]
        assert recipe.tuning.trials >= len(recipe.tuning.searched["update.lr"])
        assert recipe.tuning.note


def test_rivals_for_a_mask_had_as_many_trials_of_their_rate():
    """Only Sparsae had more; at 90 % nobody's was searched again, which the recipes say."""
    names = ["backprop", "magnitude", "static", "set", "rigl", "sparsae"]
    recipes = [load_recipe(ROOT / "sparse" / f"{name}.yaml", ["data.path=text.txt"]) for name in names]
    assert [recipe.tuning.trials for recipe in recipes] == [7, 7, 7, 7, 7, 8]
    for recipe in recipes:
        grid = recipe.tuning.searched["update.lr"]
        assert len(grid) == 5
        assert recipe.update.lr not in (min(grid), max(grid))
    sparser = [load_recipe(path, ["data.path=text.txt"]) for path in sorted((ROOT / "sparse_90").glob("*_90.yaml"))]
    assert {recipe.name for recipe in sparser if recipe.tuning} == {"sparsae_90"}
    assert all(recipe.tuning.searched["update.lr"] == [1.2e-2] for recipe in sparser if recipe.tuning)


def test_the_sources_critics_try_the_step_that_is_taken():
    recipe = load_recipe(ROOT / "meta_critic" / "meta_critic_source.yaml", ["data.path=text.txt"])
    assert recipe.credit.step == recipe.update.lr
    assert (recipe.credit.density, recipe.credit.rank) == (1.0, 4)
    assert "without its mask" in recipe.description
