"""Sparse runs from end to end: refusals, log, summary, export, inference."""

import json

import pytest
import torch
from safetensors.torch import load_file

from heterodox.app.export import describe_sparse, export_run, read_sparse
from heterodox.app.load import load_run
from heterodox.app.plan import plan
from heterodox.app.recipe import load_recipe
from heterodox.app.train import train
from heterodox.app.use import generate_run
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.state import split
from heterodox.model import GPT
from heterodox.model.sparse_inference import SparseLinear, for_inference, remove_dead_units
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.metrics import read_rows
from tests.tiny import tiny_gpt, tiny_recipe

SPARSE = {"name": "sparse", "lr": 0.01, "sparsity": 0.9, "burn_in": {"steps": 2}}
SEARCH = {"name": "sparsae", "every": 6, "children": 2, "micro_batch": 8, "reset": {"batch": 8}, "mutation": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = tiny_recipe(
        update=SPARSE | {"topology": SEARCH},
        objective={"name": "self_distillation", "warmup_steps": 10},
        model={"bias": True, "width": 32},
    )
    return train(recipe, tmp_path_factory.mktemp("sparse") / "run")


def test_summary_and_metrics_tell_what_was_sparse(run):
    summary = run.summary
    masked = sum(p.numel() for n, p in run.model.named_parameters() if n.startswith("blocks") and p.ndim == 2)
    assert summary["parameters"] - summary["active_parameters"] == masked - round(0.1 * masked)
    assert summary["meta_tokens"] > 0
    assert 0 < summary["search_seconds"] < summary["seconds"]
    assert summary["flops"] > summary["sparse_flops"] > 0.2 * summary["flops"]
    rows = list(read_rows(run.folder / "metrics.jsonl"))
    assert [row["step"] for row in rows if row["kind"] == "mask"] == [1, 6, 12, 18]
    assert len([row for row in rows if row["kind"] == "candidate"]) == 9
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert last["density"] == pytest.approx(0.1, abs=1e-3)
    assert {"child_wins", "search_seconds", "distillation_weight", "distillation_divergence"} <= last.keys()


@pytest.mark.parametrize(
    "search",
    [{}, {"signal": "micro_batch"}, {"signal": "micro_batch", "judge": "at_once", "margin": 0.0}, {"children": 0}],
)
def test_the_search_is_planned(search, tmp_path):
    """To the FLOP and the token."""
    recipe = tiny_recipe(update=SPARSE | {"topology": SEARCH | search}, model={"width": 32, "layers": 1})
    spent, foretold = train(recipe, tmp_path / "run").summary, plan(recipe)
    assert {key: foretold[key] for key in ("flops", "tokens", "meta_tokens")} == {
        key: spent[key] for key in ("flops", "tokens", "meta_tokens")
    }
    assert (spent["meta_tokens"] > 0) == (search.get("children") != 0)


def test_a_sparse_file_is_smaller_and_says_the_same(run, tmp_path):
    out = export_run(run.folder, "sparse", tmp_path / "model.safetensors")
    about = describe_sparse(out)
    dense = export_run(run.folder, "safetensors", tmp_path / "dense.safetensors")
    weights = load_file(out)
    masked = {name.removesuffix(".bits") for name in weights if name.endswith(".bits")}
    assert len(masked) == 12
    promised = sum(t.nbytes for name, t in load_file(dense).items() if name not in masked)
    promised += about["connections"] * 4 + about["places"] / 8
    assert sum(t.nbytes for t in weights.values()) <= promised + 12 + about["units"] / 8
    loaded = read_sparse(out)
    tokens = torch.randint(8, (3, 16), generator=torch.Generator().manual_seed(0))
    there, here = load_run(run.folder).model(tokens), loaded.model(tokens)
    assert torch.allclose(there, here, rtol=1e-5, atol=1e-6)
    assert there.std() > 0.1
    for name, mask in loaded.masks.items():
        assert not loaded.model.state_dict()[name][~mask].any()
    assert sum(int(mask.sum()) for mask in loaded.masks.values()) == about["connections"]
    text = generate_run(out, "a", 5, temperature=0.0)
    assert text == generate_run(run.folder, "a", 5, temperature=0.0)


def test_the_inference_model_says_the_same_in_either_form(run, tmp_path):
    loaded = read_sparse(export_run(run.folder, "sparse", tmp_path / "model.safetensors"))
    fast, timings = for_inference(loaded.model, loaded.masks, loaded.alive, rounds=3)
    assert {timing.name + ".weight" for timing in timings} == set(loaded.masks)
    tokens = torch.randint(8, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fast(tokens), loaded.model(tokens), rtol=1e-4, atol=1e-5)
    assert all(timing.dense_seconds > 0 for timing in timings)
    for timing in timings:
        assert isinstance(fast.get_submodule(timing.name), SparseLinear) == timing.sparse_wins


@pytest.mark.parametrize("bias", [False, True])
def test_a_csr_layer_is_the_dense_one(bias):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(12, 7, bias=bias)
    with torch.no_grad():
        layer.weight[torch.rand(7, 12, generator=generator) < 0.8] = 0
        layer.weight[3] = 0
    sparse = SparseLinear(layer.weight, layer.bias)
    for shape in ((12,), (1, 12), (2, 3, 12)):
        x = torch.randn(shape, generator=generator)
        assert torch.allclose(sparse(x), layer(x), atol=1e-6)
        assert sparse(x).shape == layer(x).shape
    assert sparse.weight.col_indices().dtype == torch.int32


def with_dead_units(**options) -> tuple[GPT, dict[str, torch.Tensor]]:
    """A tiny GPT in whose first MLP units 0 and 1 have no way in, 2 and 3 none out."""
    model = tiny_gpt(**options)
    masks = {
        n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if ".mlp." in n and p.ndim == 2
    }
    masks["blocks.0.mlp.fc.weight"][:2] = False
    masks["blocks.0.mlp.proj.weight"][:, 2:4] = False
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model, masks


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"bias": True}, {"bias": True, "mlp_top_k": 3}, {"bias": False, "mlp_top_k": 3}]
)
def test_dead_units_go_and_no_logit_changes(options):
    model, masks = with_dead_units(**options)
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    before = model(tokens)
    alive = remove_dead_units(model, masks)["blocks.0.mlp"]
    expected = [0, 1] if options == {"bias": False, "mlp_top_k": 3} else [] if "mlp_top_k" in options else [0, 1, 2, 3]
    assert (~alive).nonzero().flatten().tolist() == expected
    after = model(tokens)
    assert torch.equal(before, after) if not options["bias"] else torch.allclose(before, after, rtol=1e-12)
    assert not model.get_parameter("blocks.0.mlp.fc.weight")[~alive].any()
    assert not masks["blocks.0.mlp.proj.weight"][:, ~alive].any()


def test_the_constant_that_a_dead_unit_emits_is_not_forgotten():
    """Without folding it into the next bias the logits would differ."""
    model, masks = with_dead_units(bias=True)
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    before, bias = model(tokens), model.blocks[0].mlp.proj.bias.detach().clone()
    remove_dead_units(model, masks)
    with torch.no_grad():
        model.blocks[0].mlp.proj.bias.copy_(bias)
    assert not torch.allclose(before, model(tokens), rtol=1e-4)


def test_a_run_without_masks_has_no_sparse_form(tmp_path):
    dense = train(tiny_recipe(run={"budget": {"steps": 1}, "sampling": {"tokens": 0}}), tmp_path / "dense")
    with pytest.raises(RecipeError, match=r"trained with update adamw, which has no masks; export it as safetensors"):
        export_run(dense.folder, "sparse", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = export_run(dense.folder, "safetensors", tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"is no sparse model: its format is None"):
        read_sparse(other)


def test_masks_that_do_not_match_their_count_are_refused(tmp_path):
    recipe = tiny_recipe(
        update=SPARSE | {"topology": "static"}, run={"budget": {"steps": 2}, "sampling": {"tokens": 0}}
    )
    train(recipe, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    model, state, values = checkpoints.load()
    masks = state["learner"]["update"]["masks"]
    name = next(iter(masks))
    masks[name].view(-1)[(~masks[name]).view(-1).nonzero()[0]] = True
    checkpoints.save(2, model, state, values)
    with pytest.raises(CheckpointError, match=r"the checkpoint's masks hold 615 connections, but it says 614"):
        train(recipe, tmp_path, resume=True)
    del state["learner"]["update"]["masks"]
    checkpoints.save(2, model, state, values)
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks mask of"):
        train(recipe, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": 1.0}, "update.sparsity: found 1.0, expected less than 1"),
        ({"sparsity": -0.1}, "update.sparsity: found -0.1, expected greater than or equal to 0"),
        ({"topology": {"name": "set", "every": 40}}, "update.topology.every is 40, but the mask may change only from"),
        ({"topology": {"name": "sparsae", "every": 6}, "sparsity": 0.97}, "update.sparsity 0.97 lies outside"),
        ({"topology": {"name": "rigl", "every": 1}}, "update.burn_in.steps is 2, expected at most"),
        (
            {"topology": "static", "lr": 0.1, "around": {"lr": 0.2}},
            "lr is 0.1, but around.lr",
        ),
        ({"topology": {"name": "sparsea"}}, "there is no 'sparsea'; did you mean 'sparsae'"),
        ({"around": "adam"}, "there is no 'adam'; did you mean 'adamw'"),
        ({"sparcity": 0.5}, "unknown key 'update.sparcity'; did you mean 'sparsity'"),
        ({"topology": {"name": "sparsae", "every": 6, "bounds": {"min_sparsity": 0.96}}}, "min_sparsity 0.96 is above"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(changes, said):
    with pytest.raises(RecipeError, match=said.replace(".", r"\.")):
        tiny_recipe(update=SPARSE | changes)


def test_other_refusals():
    with pytest.raises(RecipeError, match="credit head_only leaves as they are"):
        tiny_recipe(update=SPARSE | {"topology": "static"}, credit={"name": "head_only"})
    with pytest.raises(RecipeError, match=r"needs a run\.budget in steps"):
        tiny_recipe(update=SPARSE | {"topology": {"name": "set", "every": 6}}, run={"budget": {"tokens": 4000}})
    static = tiny_recipe(update=SPARSE | {"topology": "static"}, run={"budget": {"tokens": 4000}})
    assert static.update.lr == static.update.around.lr == 0.01


def test_the_learning_rate_is_the_inner_updates_wherever_it_is_written():
    recipe = tiny_recipe(update={"name": "sparse", "around": {"name": "sgd", "lr": 0.5}, "topology": "static"})
    changed = load_recipe(recipe, ["update.lr=0.25"])
    assert (recipe.update.lr, changed.update.lr, changed.update.around.name) == (0.5, 0.25, "sgd")
    assert load_recipe(changed.dump()).update.lr == 0.25
    assert json.loads(json.dumps(changed.dump()))["update"]["around"]["lr"] == 0.25
    assert "lr" not in changed.dump()["update"]
    later = load_recipe({"update": {"name": "sparse", "lr": 0.5, "topology": "static"}}, ["update.around.lr=0.25"])
    assert later.update.lr == 0.25


def test_state_has_masks_by_parameter_name(run):
    state = Checkpoints(run.folder / "checkpoints").load()[1]["learner"]["update"]
    assert all(mask.dtype == torch.bool for mask in state["masks"].values())
    assert (
        set(state["masks"])
        == set(state["ever"])
        == {n for n, p in run.model.named_parameters() if "blocks" in n and p.ndim == 2}
    )
    assert "around/moments/head.weight/first" in split(state)[0]
