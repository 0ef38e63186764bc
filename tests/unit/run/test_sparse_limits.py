"""Sparse runs at their limits: what is refused, what is planned where steps differ, damaged files, longer runs."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heterodox.app.export import export_run, read_sparse
from heterodox.app.load import load_run
from heterodox.app.plan import plan
from heterodox.app.train import train
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.training.metrics import read_rows
from tests.tiny import tiny_recipe

SPARSE = {"name": "sparse", "sparsity": 0.8, "lr": 0.01, "burn_in": {"steps": 0}}
QUIET = {"sampling": {"tokens": 0}, "eval_batches": 1, "batch_size": 8}


def recipe_of(topology, steps: int = 6, **sections):
    update = SPARSE | {"topology": topology} | sections.pop("update", {})
    return tiny_recipe(update=update, run=QUIET | {"budget": {"steps": steps}}, **sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"update": {"layers": ["blocks.*.mlp.*"]}, "credit": {"name": "head_only"}},
            r"would mask blocks\.0\.mlp\.fc\.weight, which the credit rule leaves as it is \(4 such matrices\)",
        ),
        (
            {"update": {"layers": ["tok_emb.weight"]}, "model": {"frozen_embeddings": True}},
            r"would mask tok_emb\.weight, which the credit rule leaves as it is \(1 such matrix\)",
        ),
    ],
)
def test_weights_that_never_move_are_not_masked(sections, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        train(recipe_of({"name": "set", "every": 2}, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ({"name": "set", "every": 2, "fraction": 1e-5}, r"update\.topology\.fraction 1e-05 of \d+ connections"),
        (
            {"name": "sparsae", "every": 2, "micro_batch": 8, "reset": {"fraction": 1e-5}},
            r"reset\.fraction 1e-05 of \d+",
        ),
        (
            {"name": "sparsae", "every": 2, "micro_batch": 100_000, "reset": {"batch": 8}},
            r"micro_batch is 100000, but the meta split has \d+ windows beside the 8 of update\.topology\.reset\.batch",
        ),
        ({"name": "rigl", "every": 2, "start": 4, "until": 0.75}, r"every is 2, but the mask may change only from"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused_with_the_numbers(topology, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        train(recipe_of(topology), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_event_with_nothing_left_to_exchange_is_none(tmp_path):
    """At the end of the cosine the share is 0; with a constant share there is an event."""
    for decay, steps in (("cosine", [1, 2, 4]), ("constant", [1, 2, 4, 6])):
        topology = {
            "name": "sparsae",
            "every": 2,
            "until": 1.0,
            "decay": decay,
            "micro_batch": 8,
            "reset": {"batch": 8},
        }
        recipe = recipe_of(topology)
        run = train(recipe, tmp_path / decay)
        assert [row["step"] for row in read_rows(run.folder / "metrics.jsonl") if row["kind"] == "mask"] == steps
        assert plan(recipe)["flops"] == run.summary["flops"]


@pytest.mark.parametrize("name", ["magnitude", "set", "rigl", "sparsae"])
def test_events_in_every_step_are_planned(name, tmp_path):
    topology = {"name": name, "every": 1, "until": 1.0}
    if name == "sparsae":
        topology |= {"micro_batch": 8, "reset": {"batch": 8}}
    recipe = recipe_of(topology, steps=4)
    assert plan(recipe)["flops"] == train(recipe, tmp_path / "run").summary["flops"]


@pytest.mark.parametrize("name", ["set", "rigl", "sparsae"])
def test_a_sparsity_that_rounds_to_none_is_dense(name, tmp_path):
    topology = {"name": name, "every": 2} | ({"micro_batch": 8, "reset": {"batch": 8}} if name == "sparsae" else {})
    topology |= {"bounds": {"min_sparsity": 0.0}} if name == "sparsae" else {}
    summary = train(recipe_of(topology, update={"sparsity": 1e-6}), tmp_path / "run").summary
    assert summary["parameters"] == summary["active_parameters"]


@pytest.mark.parametrize("weights", [{"end": 0.0}, {"start": 0.0}, {}])
def test_a_teacher_is_planned_for_the_steps_that_ask_it(weights, tmp_path):
    objective = {"name": "self_distillation", "warmup_steps": 2, "anneal": 0.4} | weights
    recipe = tiny_recipe(objective=objective, run=QUIET | {"budget": {"steps": 10}})
    assert plan(recipe)["flops"] == train(recipe, tmp_path / "run").summary["flops"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_longer_run_brings_nothing_back_that_magnitude_has_pruned(scope, tmp_path):
    topology = {"name": "magnitude", "every": 2, "scope": scope}
    train(recipe_of(topology, steps=8), tmp_path / "run")
    longer = train(recipe_of(topology, steps=24), tmp_path / "run", resume=True)
    rows = [row for row in read_rows(longer.folder / "metrics.jsonl") if row["kind"] == "mask"]
    assert [row["grown"] for row in rows] == [0] * len(rows)
    assert rows[-1]["step"] > 8
    assert rows[-1]["active"] == round(0.2 * rows[-1]["size"])


@pytest.fixture(scope="module")
def half_masked(tmp_path_factory):
    """A run that masks the way into its MLPs and not the way out."""
    recipe = recipe_of("static", update={"layers": ["blocks.*.mlp.fc*"], "sparsity": 0.95}, model={"bias": True})
    return train(recipe, tmp_path_factory.mktemp("half") / "run")


def test_dead_units_leave_dense_matrices_too(half_masked, tmp_path):
    out = export_run(half_masked.folder, "sparse", tmp_path / "model.safetensors")
    stored, whole = load_file(out), load_run(half_masked.folder).model
    units = sum(
        int(size) for size in (stored["blocks.0.mlp.fc.bias"].shape[0], stored["blocks.0.mlp.proj.weight"].shape[1])
    )
    assert 0 < units < 2 * whole.blocks[0].mlp.fc.weight.shape[0]
    tokens = torch.randint(8, (3, 16), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(read_sparse(out).model(tokens), whole(tokens), rtol=1e-5, atol=1e-6)


def test_a_damaged_sparse_file_is_an_error_of_one_line(half_masked, tmp_path):
    out = export_run(half_masked.folder, "sparse", tmp_path / "model.safetensors")
    with safe_open(out, framework="pt") as file:
        facts = file.metadata()
    name = next(key for key in load_file(out) if key.endswith(".values"))
    for damage in ("shorter", "gone", "facts"):
        tensors, said = load_file(out), dict(facts)
        if damage == "shorter":
            tensors[name] = tensors[name][:-1].clone()
        elif damage == "gone":
            del tensors[name]
        else:
            del said["recipe"]
        save_file(tensors, tmp_path / "damaged", said)
        with pytest.raises(CheckpointError, match="damaged is damaged"):
            read_sparse(tmp_path / "damaged")
