"""What a finished run is good for: text, export, probes; and the plan that foretold it."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open

from heterodox.app.export import export_run
from heterodox.app.load import load_run
from heterodox.app.plan import plan
from heterodox.app.train import train
from heterodox.app.use import generate_run, probe_run
from heterodox.core.errors import CheckpointError, RecipeError
from tests.command import heterodox
from tests.conformance.combinations import CREDITS, recipe_of
from tests.switches import SWITCHES
from tests.tiny import tiny_recipe

CONTEXT = 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of backprop with biases, whose last checkpoint is at step 30."""
    out = tmp_path_factory.mktemp("uses") / "run"
    train(tiny_recipe(model={"bias": True}, run={"probe_every": 30}), out)
    return out


def test_text_depends_on_the_seed_alone(trained):
    texts = [generate_run(trained, "ab", 40, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 40 > CONTEXT


def test_temperature_0_takes_the_likeliest_beyond_the_context_too(trained):
    text = generate_run(trained, "ab", 2 * CONTEXT, temperature=0.0, seed=1)
    assert text == generate_run(trained, "ab", 2 * CONTEXT, temperature=0.0, seed=2)
    run = load_run(trained)
    tokens = run.tokenizer.encode("ab").tolist()
    for _ in range(2 * CONTEXT):
        with torch.no_grad():
            tokens.append(int(run.model(torch.tensor([tokens[-CONTEXT:]]))[0, -1].argmax()))
    assert text == run.tokenizer.decode(tokens[2:])


@pytest.mark.parametrize(("options", "size"), [({"top_k": 1}, 1), ({"top_k": 3}, 3), ({"top_p": 0.6}, None)])
def test_top_k_and_top_p_keep_to_the_right_set(options, size, trained):
    run = load_run(trained)
    with torch.no_grad():
        odds = run.model(torch.from_numpy(run.tokenizer.encode("ab"))[None])[0, -1].softmax(-1)
    ordered = odds.sort(descending=True)
    if size is None:  # the smallest set whose mass reaches p
        size = int((ordered.values.cumsum(0) < options["top_p"]).sum()) + 1
    allowed = set(run.tokenizer.decode(ordered.indices[:size]))
    drawn = {generate_run(trained, "ab", 1, seed=seed, **options) for seed in range(25)}
    assert drawn <= allowed
    assert len(drawn) > 1 or size == 1


def test_listeners_hear_the_prompt_and_every_piece(trained):
    heard: list[str] = []
    text = generate_run(trained, "ab", 5, on_text=heard.append)
    assert "".join(heard) == "ab" + text
    assert heterodox("generate", trained, "--prompt", "ab", "--tokens", 5, "--temperature", 1).out == f"ab{text}\n"


def test_a_half_finished_character_is_said_at_the_end(tmp_path):
    train(tiny_recipe(data={"tokenizer": "byte"}), tmp_path / "run")
    heard: list[str] = []
    run = load_run(tmp_path / "run")
    with torch.no_grad():  # a model that only says 0xc3, the first half of an é
        run.model.head.weight.zero_()
    text = generate_run(tmp_path / "run", "é", 30, temperature=100.0, on_text=heard.append)
    assert "".join(heard) == "é" + text


def test_safetensors_come_back_as_they_were(trained, tmp_path):
    out = export_run(trained, "safetensors", tmp_path / "deep" / "weights.safetensors")
    run = load_run(trained)
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == set(run.model.state_dict())
        for name, weight in run.model.state_dict().items():
            assert torch.equal(file.get_tensor(name), weight)
        assert json.loads(file.metadata()["recipe"]) == run.recipe.dump()
        assert file.metadata()["step"] == "30"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_gives_the_same_logits(bias, trained, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, on import
        transformers = pytest.importorskip("transformers")
    source = trained
    if not bias:
        source = tmp_path / "run"
        train(tiny_recipe(), source)
    answer = heterodox("export", source, "--format", "gpt2", "--out", tmp_path / "gpt2", "--json")
    assert json.loads(answer.out) == {"format": "gpt2", "path": str(tmp_path / "gpt2")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    ours = load_run(source).model
    tokens = torch.randint(8, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
    assert a.std() > 0.1
    assert (a - b).abs().max() < 1e-5
    assert (tmp_path / "gpt2" / "tokenizer.json").exists()


@pytest.mark.parametrize("switch", SWITCHES)
def test_gpt2_takes_only_models_with_its_own_forward_pass(switch, tmp_path):
    train(
        tiny_recipe(model=SWITCHES[switch], run={"budget": {"steps": 1}, "sampling": {"tokens": 0}}), tmp_path / "run"
    )
    same_forward = {"softmax_backward", "straight_through_gelu", "norm_backward", "frozen_embeddings"}
    if same_forward.issuperset(SWITCHES[switch]):
        export_run(tmp_path / "run", "gpt2", tmp_path / "gpt2")
        return
    key, value = next(iter(SWITCHES[switch].items()))
    with pytest.raises(
        RecipeError, match=f"GPT-2 has nothing like the model's {key} {value}; export it as safetensors"
    ):
        export_run(tmp_path / "run", "gpt2", tmp_path / "gpt2")
    assert not (tmp_path / "gpt2").exists()
    export_run(tmp_path / "run", "safetensors", tmp_path / "weights")
    with safe_open(tmp_path / "weights", "pt") as file:  # frozen bases and all
        assert set(file.keys()) == set(load_run(tmp_path / "run").model.state_dict())


@pytest.mark.parametrize("credit", CREDITS)
def test_the_plan_is_what_the_run_then_reports(credit, tmp_path):
    recipe = recipe_of(credit, "adamw", run={"budget": {"steps": 3}, "sampling": {"tokens": 0}})
    foretold = plan(recipe)
    summary = train(recipe, tmp_path / "run").summary
    assert foretold["parameters"] == summary["parameters"]
    assert foretold["per_step"]["flops"] * 3 == foretold["flops"] == summary["flops"]
    assert foretold["tokens"] == summary["tokens"]
    assert foretold["meta_tokens"] == summary["meta_tokens"]
    assert foretold["memory_bytes"]["activations"] == summary["activation_bytes"]
    assert foretold["steps"] == summary["steps"]


def test_a_plan_knows_the_masks_and_the_teacher(tmp_path):
    parts = {
        "objective": {"name": "self_distillation", "warmup_steps": 1},
        "update": {"name": "sparse", "sparsity": 0.8, "topology": {"name": "static"}},
    }
    recipe = tiny_recipe(run={"budget": {"steps": 3}, "sampling": {"tokens": 0}}, **parts)
    foretold = plan(recipe)
    summary = train(recipe, tmp_path / "run").summary
    assert foretold["active_parameters"] == summary["active_parameters"] < summary["parameters"]
    assert foretold["memory_bytes"]["objective_state"] == foretold["memory_bytes"]["weights"]
    assert foretold["flops"] == pytest.approx(summary["flops"], abs=3)
    taught = plan(tiny_recipe(run={"budget": {"steps": 3}}, update=parts["update"]))["flops"]
    assert foretold["flops"] - taught == pytest.approx(taught * 2 / 9, rel=1e-3), "two forward passes of nine thirds"


@pytest.mark.parametrize(("budget", "steps"), [({"tokens": 129}, 2), ({"flops": 1.0}, 1), ({"seconds": 5.0}, None)])
def test_a_plan_knows_how_far_a_budget_reaches(budget, steps):
    assert plan(tiny_recipe(run={"budget": budget}))["steps"] == steps


def test_probing_backprop_finds_the_exact_gradient(trained):
    report = probe_run(trained, num_batches=3)
    names = {name for name, _ in load_run(trained).model.named_parameters()}
    assert {row["parameter"] for row in report} == names
    for row in report:
        if not row["parameter"].endswith("attn.k.bias"):  # whose gradient is zero but for rounding
            assert row["cosine"] == pytest.approx(1.0, abs=1e-6), row
            assert row["norm_ratio"] == pytest.approx(1.0, abs=1e-6), row
            assert row["sign_agreement"] == 1.0, row


def test_probing_under_dropout_draws_the_masks_of_training(tmp_path):
    train(tiny_recipe(model={"dropout": 0.3}, run={"probe_every": 10}), tmp_path / "run")
    reports = [probe_run(tmp_path / "run", num_batches=2) for _ in range(2)]
    assert reports[0] == reports[1]
    assert all(row["cosine"] == pytest.approx(1.0, abs=1e-6) for row in reports[0])


def test_probing_another_rule_does_not(tmp_path):
    train(tiny_recipe(credit="feedback_alignment"), tmp_path / "run")
    cosines = {row["parameter"]: row["cosine"] for row in probe_run(tmp_path / "run")}
    assert cosines["head.weight"] == pytest.approx(1.0)
    assert abs(cosines["blocks.0.mlp.fc.weight"]) < 0.9


def test_a_corpus_may_move(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, " * 500)
    train(tiny_recipe(data={"path": str(tmp_path / "a.txt")}, run={"budget": {"steps": 5}}), tmp_path / "run")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    moved = train(tiny_recipe(data={"path": str(tmp_path / "b.txt")}), tmp_path / "run", resume=True)
    assert moved.summary["steps"] == 30


def test_a_corpus_that_has_changed_is_not_probed(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, " * 500)
    train(tiny_recipe(data={"path": str(tmp_path / "text.txt")}), tmp_path / "run")
    assert probe_run(tmp_path / "run")
    (tmp_path / "text.txt").write_text("that is the question " * 500)
    with pytest.raises(CheckpointError, match="was trained on another corpus"):
        probe_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="was trained with another corpus"):
        train(load_run(tmp_path / "run").recipe, tmp_path / "run", resume=True)
