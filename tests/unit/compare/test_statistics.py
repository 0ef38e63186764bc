"""Numbers computed by hand or by scipy's own t-interval, and what must not poison them."""

import json
import math

import pytest
from scipy import stats

from heterodox.report.statistics import (
    Interval,
    architecture,
    architectures,
    gap_closed,
    interval,
    paired_difference,
    table,
)


def row(recipe: str, seed: int, val_loss: float | None, **changes: object) -> dict:
    summary = {
        "recipe": recipe, "seed": seed, "val_loss": val_loss, "val_bits_per_byte": 2.0, "test_loss": 3.0,
        "tokens": 1000, "meta_tokens": 0, "flops": 10**9, "seconds": 2.0, "activation_bytes": 100,
        "peak_memory_bytes": 200, "parameters": 50, "active_parameters": 40, "status": "finished",
        "credit": recipe,
    }  # fmt: skip
    return summary | changes


def study() -> list[dict]:
    losses = {"backprop": [1.0, 2.0, 3.0], "rule": [1.5, 2.7, 3.3], "head_only": [2.0, 3.0, 4.0]}
    return [row(name, seed, loss) for name, values in losses.items() for seed, loss in enumerate(values)]


def test_interval_by_hand():
    # mean 2, standard deviation 1, error 1/√3, t(2, 97.5 %) = 4.30265
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.n == 3
    assert found.high == pytest.approx(2 + 4.302652729911275 / math.sqrt(3))
    assert found.low == pytest.approx(2 - 4.302652729911275 / math.sqrt(3))


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_interval_agrees_with_scipy(confidence: float):
    values = [2.31, 2.44, 2.29, 2.38, 2.5]
    low, high = stats.t.interval(confidence, len(values) - 1, loc=sum(values) / 5, scale=stats.sem(values))
    found = interval(values, confidence)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval():
    assert interval([2.5]) == Interval(2.5, None, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_interval_refuses_what_has_no_mean(values: list[float]):
    with pytest.raises(ValueError, match="finite"):
        interval(values)


def test_paired_difference_uses_common_seeds_only():
    found = paired_difference({0: 1.5, 1: 2.7, 7: 99.0}, {0: 1.0, 1: 2.0, 8: -99.0})
    assert found is not None
    assert found.n == 2
    assert found.mean == pytest.approx(0.6)
    low, high = stats.t.interval(0.95, 1, loc=0.6, scale=0.1)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pairing_is_narrower_than_the_seeds_spread():
    """Seeds differ by whole nats here, the rules by tenths: only the pairing sees it."""
    paired = table(study(), "backprop")[1]["difference"]
    assert paired["mean"] == pytest.approx(0.5)
    assert paired["low"] > 0
    assert interval([1.5, 2.7, 3.3]).low < 1.0


def test_table_has_one_row_per_recipe_in_order():
    rows = table(study(), "backprop")
    assert [r["recipe"] for r in rows] == ["backprop", "rule", "head_only"]
    assert rows[0]["val_loss"]["mean"] == 2.0
    assert rows[0]["val_loss"]["n"] == rows[0]["seeds"] == 3
    assert rows[0]["difference"] is None
    assert [r["failed"] for r in rows] == [0, 0, 0]
    json.dumps(rows, allow_nan=False)


def test_gap_closed_is_zero_at_head_only_and_one_at_the_baseline():
    backprop, rule, head_only = table(study(), "backprop")
    assert backprop["gap_closed"] == 1.0
    assert head_only["gap_closed"] == 0.0
    assert rule["gap_closed"] == pytest.approx(1.5 / 3)


def test_gap_closed_needs_a_gap():
    assert gap_closed({0: 1.0}, {0: 2.0}, {1: 1.0}) is None
    assert gap_closed({0: 1.0}, {0: 1.0}, {0: 1.0}) is None
    assert gap_closed({0: 1.0}, {0: 0.5}, {0: 1.0}) is None
    assert gap_closed({0: 3.0}, {0: 2.0}, {0: 1.0}) == -1.0
    without = [r for r in study() if r["credit"] != "head_only"]
    assert [r["gap_closed"] for r in table(without, "backprop")] == [None, None]


def test_head_only_is_found_by_its_credit_not_by_its_name():
    rows = [r | {"recipe": "frozen blocks"} if r["recipe"] == "head_only" else r for r in study()]
    assert table(rows, "backprop")[1]["gap_closed"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "bad",
    [
        {"val_loss": None}, {"val_loss": math.nan}, {"val_loss": math.inf}, {"status": "diverged"},
        {"status": "interrupted"}, {"status": "failed", "val_loss": None, "tokens": None, "flops": None},
    ],
)  # fmt: skip
def test_a_bad_run_is_counted_and_left_out(bad: dict):
    rows = [r | bad if (r["recipe"], r["seed"]) == ("rule", 2) else r for r in study()]
    rule = table(rows, "backprop")[1]
    assert (rule["seeds"], rule["failed"] + rule["unfinished"]) == (2, 1)
    assert rule["unfinished"] == (bad.get("status") in ("waiting", "running", "interrupted"))
    assert rule["val_loss"]["mean"] == pytest.approx(2.1)
    assert rule["difference"]["n"] == 2
    assert rule["gap_closed"] == pytest.approx(0.8 / 2)


def test_a_recipe_without_a_finished_run_keeps_its_row():
    rows = [r | {"status": "diverged"} if r["recipe"] == "rule" else r for r in study()]
    rule = table(rows, "backprop")[1]
    assert (rule["seeds"], rule["failed"]) == (0, 3)
    assert all(rule[key] is None for key in ("val_loss", "difference", "gap_closed", "tokens", "flops"))


def test_a_gap_exists_only_within_one_model():
    small = {"name": "gpt", "width": 8}
    models = {"backprop": small, "rule": {"name": "other"}, "head_only": small}
    described = [{"name": name, "resolved": {"model": model}} for name, model in models.items()]
    backprop, rule, _ = table(study(), "backprop", architectures(described))
    assert backprop["gap_closed"] == 1.0
    assert (rule["gap_closed"], rule["gap_missing"]) == (
        None,
        "no run of head_only and of exact gradient on this model",
    )
    rows = study()
    own = [
        r | {"recipe": f"own {r['recipe']}", "credit": {"backprop": "bptt"}.get(r["credit"], r["credit"])} for r in rows
    ]
    described += [{"name": f"own {name}", "resolved": {"model": {"name": "other"}}} for name in models]
    found = {row["recipe"]: row for row in table([*rows, *own], "backprop", architectures(described))}
    assert found["rule"]["gap_closed"] == found["own rule"]["gap_closed"] == pytest.approx(1.5 / 3)
    assert found["own backprop"]["gap_closed"] == 1.0


def test_how_errors_travel_back_does_not_make_another_model():
    assert architecture({"name": "gpt", "norm_backward": "exact"}) == architecture(
        {"name": "gpt", "norm_backward": "x"}
    )
    assert architecture({"name": "gpt", "width": 8}) != architecture({"name": "gpt", "width": 9})


def test_a_missing_baseline_gives_no_differences():
    assert all(r["difference"] is None and r["gap_closed"] is None for r in table(study(), "nobody"))


def test_costs_are_medians():
    rows = [row("a", seed, 1.0, seconds=s, flops=f) for seed, s, f in [(0, 1.0, 10), (1, 9.0, 30), (2, 2.0, 11)]]
    found = table(rows, "a")[0]
    assert (found["seconds"], found["flops"]) == (2.0, 11)
    assert isinstance(found["flops"], int)
