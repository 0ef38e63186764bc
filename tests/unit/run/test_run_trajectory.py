"""What must not change the path of the weights, and what every rule must share at a seed."""

import pytest
import torch

from heterodox.app.folder import first_difference
from heterodox.app.recipe import Recipe, load_recipe
from heterodox.app.session import open_session
from heterodox.app.train import train
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.evaluation import bits_per_byte, evaluate
from heterodox.training.metrics import read_rows
from tests.saved import assert_same_bits, tensors, timeless
from tests.tiny import tiny_recipe

DROPOUT = {"model": {"dropout": 0.2}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with dropout, to which others are compared."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(tiny_recipe(**DROPOUT), out)
    return out


def run_of(recipe: Recipe, folder) -> dict[str, torch.Tensor]:
    train(recipe, folder)
    return tensors(folder)


def test_dropout_is_reproducible(plain, tmp_path):
    assert_same_bits(run_of(tiny_recipe(**DROPOUT), tmp_path / "again"), tensors(plain))
    assert timeless(tmp_path / "again") == timeless(plain)
    torch.manual_seed(99)
    assert_same_bits(run_of(tiny_recipe(**DROPOUT), tmp_path / "seeded"), tensors(plain))


def test_dropout_does_something(plain, tmp_path):
    other = run_of(tiny_recipe(), tmp_path / "without")
    assert not torch.equal(other["model/head.weight"], tensors(plain)["model/head.weight"])


@pytest.mark.parametrize("every", [1, 7])
def test_probes_do_not_change_the_trajectory(every, plain, tmp_path):
    recipe = tiny_recipe(**DROPOUT, run={"probe_every": every})
    assert_same_bits(run_of(recipe, tmp_path / "probed"), tensors(plain))
    probes = list(read_rows(tmp_path / "probed" / "metrics.jsonl", "probe"))
    assert [row["step"] for row in probes] == list(range(every, 31, every))
    for row in probes:
        for name, measures in row["alignment"].items():  # backprop is the exact gradient, dropout included
            assert measures["cosine"] == pytest.approx(1.0), name
            assert measures["norm_ratio"] == pytest.approx(1.0), name
    others = [row for row in timeless(tmp_path / "probed") if row["kind"] != "probe"]
    assert others == timeless(plain)


def test_neither_do_logging_evaluating_and_checkpointing(plain, tmp_path):
    often = {"log_every": 1, "eval_every": 3, "checkpoint_every": 4, "sampling": {"tokens": 0}}
    assert_same_bits(run_of(tiny_recipe(**DROPOUT, run=often), tmp_path / "often"), tensors(plain))


def test_nor_does_measuring_the_held_bytes(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("heterodox.learner.step.activation_bytes", lambda *_: 0)
    assert_same_bits(run_of(tiny_recipe(**DROPOUT), tmp_path / "unmeasured"), tensors(plain))
    assert Checkpoints(plain / "checkpoints").load()[1]["loader"] == {"position": 30 * 8}


def test_another_seed_is_another_run(plain, tmp_path):
    other = run_of(tiny_recipe(**DROPOUT, seed=1), tmp_path / "other")
    weights = {name: weight for name, weight in tensors(plain).items() if name.startswith("model/")}
    assert len(weights) > 10
    for name, weight in weights.items():
        assert not torch.equal(weight, other[name]), name


@pytest.mark.parametrize("credit", ["direct_feedback", "head_only"])
def test_every_rule_sees_the_same_weights_data_and_evaluation(credit):
    sessions = [open_session(tiny_recipe(credit=name), Solo(), "cpu") for name in ("backprop", credit)]
    for first, second in zip(sessions[0].model.parameters(), sessions[1].model.parameters(), strict=True):
        assert torch.equal(first, second)
    for _ in range(200):  # more than an epoch
        first, second = (session.loader.next_batch() for session in sessions)
        assert torch.equal(first.inputs, second.inputs)
        assert torch.equal(first.targets, second.targets)
    for held_out in ("val_batches", "test_batches"):
        first, second = (list(getattr(session, held_out)) for session in sessions)
        assert len(first) == len(second) == 2
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.inputs, b.inputs)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("credit", ["backprop", "feedback_alignment", "direct_feedback", "head_only"])
def test_every_precision_runs(credit, precision, tmp_path):
    short = {"budget": {"steps": 6}, "sampling": {"tokens": 0}}
    run, reference = (
        train(tiny_recipe(credit=credit, run=short | {"precision": name}), tmp_path / name)
        for name in (precision, "float32")
    )
    assert run.summary["status"] == "finished"
    dtype = torch.float64 if precision == "float64" else torch.float32  # bfloat16 is for the arithmetic alone
    assert {parameter.dtype for parameter in run.model.parameters()} == {dtype}
    difference = abs(run.summary["val_loss"] - reference.summary["val_loss"])
    assert 0 < difference < (1e-5 if precision == "float64" else 0.02)
    assert run.summary["activation_bytes"] != reference.summary["activation_bytes"]


def test_evaluation_is_the_mean_over_all_tokens():
    session = open_session(tiny_recipe(run={"eval_batches": None, "eval_batch_size": 7}), Solo(), "cpu")
    model = session.model.double()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="none"
            )
            for batch in session.val_batches
        ]
    assert len({len(loss) for loss in losses}) == 2  # the last batch is smaller
    model.train()
    assert evaluate(model, session.val_batches, Solo()) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-12)
    assert model.training
    assert bits_per_byte(2 * 0.6931471805599453, 4.0) == pytest.approx(0.5)


def test_a_batch_that_cannot_be_divided():
    three = Solo()
    three.world_size = 3
    with pytest.raises(RecipeError, match=r"run\.batch_size 8 cannot be divided among 3 ranks"):
        open_session(tiny_recipe(), three, "cpu")


def test_tensorboard_gets_every_row(tmp_path):
    train(load_recipe(tiny_recipe(), ["log.tensorboard=true"]), tmp_path / "run")
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert file.stat().st_size > 1000


def test_the_first_difference_of_two_recipes():
    a, b = tiny_recipe().dump(), tiny_recipe(log={"tensorboard": True}, run={"threads": 2}).dump()
    assert first_difference(a, b) is None
    assert first_difference(a, tiny_recipe(seed=3).dump()) == ("seed", 0, 3)
    assert first_difference(a, tiny_recipe(credit="direct_feedback").dump())[0] == "credit.name"
    assert first_difference({"x": 1}, {"x": 1, "y": 2}) == ("y", None, 2)
