"""The parts of Sparsae: bounds, scores, resets, candidates, and what the log is told."""

import math

import pytest
import torch

from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.update import Sparse
from heterodox.update.sparse.children import (
    Bounds,
    BoundsOptions,
    Prefetch,
    Proxy,
    ProxyOptions,
    layer_activities,
    relative_signal,
    unevenness,
)
from heterodox.update.sparse.masks import Masks
from heterodox.update.sparse.sparsae import ResetOptions, Resets, SparsaeOptions
from heterodox.update.sparse.topology import Schedule, cubic
from heterodox.update.sparse.update import first_values
from tests.tiny import tiny_batch, tiny_gpt
from tests.tiny_sparse import RandomBatches, events_of, options, sparse_learner, supply


def test_a_dead_layer_may_become_sparser_up_to_the_cap():
    choice = {"min_sparsity": 0.5, "max_sparsity": 0.8, "dead_events": 3, "widen": 0.05, "cap": 0.08}
    bounds = Bounds(BoundsOptions.model_validate(choice), [1000, 1000], 0.8)
    assert (bounds.lower, bounds.upper) == ([200, 200], [500, 500])
    for _ in range(2):
        assert bounds.note([1e-5, 1.0]) == []
    assert bounds.note([1.0, 1.0]) == []  # not in a row
    found = [bounds.note([1e-5, 1.0]) for _ in range(9)]
    assert [number for number, widened in enumerate(found, 1) if widened] == [3, 6]
    assert bounds.lower == [120, 200]  # 200 − 50 − 50 is below 1000 · (1 − 0.88)
    again = Bounds(BoundsOptions.model_validate(choice), [1000, 1000], 0.8)
    again.load_state(bounds.state())
    assert again.lower == bounds.lower


def candidates(*losses: float) -> list[dict]:
    return [
        {"ce": loss, "diversity": 0.1 * n, "activity": 1.0 + n, "finite": math.isfinite(loss)}
        for n, loss in enumerate(losses)
    ]


def test_scores_are_weighted_z_values_and_what_is_not_finite_loses():
    proxy = Proxy(ProxyOptions.model_validate({"diversity": 0.5, "activity": 0.25}))
    rows = candidates(2.0, 4.0, math.nan)
    proxy.score(rows, 0.0)
    assert rows[0]["z"] == pytest.approx({"ce": -1, "diversity": -1, "activity": -1}, abs=1e-3)
    assert rows[0]["score"] == pytest.approx(-1 - 0.5 + 0.25, abs=1e-3)
    assert rows[1]["score"] == pytest.approx(1 + 0.5 - 0.25, abs=1e-3)
    assert rows[2]["score"] == math.inf
    mean, variance = proxy.mean["ce"], proxy.variance["ce"]
    proxy.follow(rows[1])
    assert proxy.mean["ce"] == pytest.approx(mean + 0.01 * (4.0 - mean))
    assert proxy.variance["ce"] == pytest.approx(variance + 0.01 * ((4.0 - mean) ** 2 - variance))


def test_the_other_parts_fade_with_the_square():
    proxy = Proxy(ProxyOptions.model_validate({"anneal": 0.5}))
    assert proxy.weights(0.0) == {"ce": 1.0, "diversity": 0.01, "activity": 0.005}
    assert proxy.weights(0.25)["diversity"] == pytest.approx(0.01 / 4)
    assert proxy.weights(0.6) == {"ce": 1.0, "diversity": 0.0, "activity": 0.0}


def test_unevenness_and_activity_by_hand():
    assert unevenness([10, 30], [100, 100], "rms") == pytest.approx(0.1)
    kl = 0.9 * math.log(0.9 / 0.8) + 0.7 * math.log(0.7 / 0.8)
    assert unevenness([10, 30], [100, 100], "kl") == pytest.approx(kl)
    assert unevenness([20, 20], [100, 100], "rms") == unevenness([20, 20], [100, 100], "kl") == 0
    signal, mask = torch.tensor([3.0, 4.0, 9.0, 5.0]), torch.tensor([True, True, False, True])
    assert layer_activities(signal, mask, [3, 1]).tolist() == pytest.approx([5 / math.sqrt(2), 5.0])


def test_a_stagnation_boosts_resets_for_two_events():
    resets = Resets(ResetOptions.model_validate({"patience": 3}))
    assert not any(resets.note(loss) for loss in (3.0, 2.0, 2.5, 2.1))
    assert resets.probability == 0.01
    assert resets.note(2.0)
    seen = []
    for _ in range(3):
        seen.append(resets.probability)
        resets.event_over()
    assert seen == [0.1, 0.1, 0.01]
    again = Resets(resets.options)
    again.load_state(resets.state())
    assert again.best == 2.0


def test_schedules():
    schedule = Schedule(every=100, start=150, until=0.75)
    assert [step for step in range(1, 1001) if schedule.due(step, 1000)] == [200, 300, 400, 500, 600, 700]
    assert schedule.num_events(1000) == 6
    assert Schedule(every=10, until=1).num_events(100) == 10
    assert (cubic(0.0), cubic(1.0)) == (0.0, 1.0)
    assert cubic(0.5) == 0.875


def test_on_a_cpu_batches_are_not_fetched_ahead():
    batches = RandomBatches(2)
    ahead = Prefetch(batches, torch.device("cpu"))
    first = ahead.next_batch()
    ahead.fetch()
    assert ahead.state() == {"taken": 1}
    assert torch.equal(first.inputs, tiny_batch(2, seed=1).inputs)


def test_every_candidate_is_told_and_the_costs_are_the_windows():
    learner = sparse_learner(options("sparsae", children=3))
    reports = [learner.step(tiny_batch(seed=step)) for step in range(1, 7)]
    rows = [event for report in reports for event in report.events]
    masks, told = ([row for row in rows if row["kind"] == kind] for kind in ("mask", "candidate"))
    assert [row["event"] for row in masks] == [0, 1, 2]
    assert [row["candidate"] for row in told] == [0, 1, 2, 3, 0, 1, 2, 3]
    for number, row in enumerate(masks[1:]):
        group = told[4 * number : 4 * number + 4]
        assert (
            [r["won"] for r in group].index(True)
            == row["winner"]
            == min(group[1:], key=lambda r: r["score"])["candidate"]
        )
        assert row["grown"] == row["dropped"] == group[row["winner"]]["swaps"]
        assert row["active"] == masks[0]["active"] == sum(layer["active"] for layer in row["layers"].values())
    model = learner.model
    forward = model.forward_flops(4, 6)
    searched = (1 + 3 + 1) * forward.total  # parent, children, stagnation
    assert reports[2].cost.flops == forward.with_backward + searched
    assert reports[2].cost.meta_tokens == 5 * 24
    assert reports[1].cost.flops == forward.with_backward
    assert reports[1].cost.meta_tokens == 0
    assert 0 < reports[1].cost.masked_flops < reports[1].cost.flops


def test_a_signal_of_its_own_costs_a_backward_pass_more():
    costs = {}
    for signal in ("training", "micro_batch"):
        learner = sparse_learner(options("sparsae", children=3, signal=signal))
        costs[signal] = [learner.step(tiny_batch(seed=step)).cost for step in range(1, 4)][2]
    forward = learner.model.forward_flops(4, 6)
    assert costs["micro_batch"].flops - costs["training"].flops == forward.with_backward
    assert costs["micro_batch"].meta_tokens - costs["training"].meta_tokens == 24
    assert costs["micro_batch"].masked_flops > costs["training"].masked_flops > 0  # that one needs a dense signal


def test_the_parent_competes_or_gives_way():
    winners = {}
    for survival in ("plus", "comma"):
        learner = sparse_learner(options("sparsae", children=2, every=1, survival=survival), steps=40)
        rows = [row for row in events_of(learner, 20) if row["kind"] == "candidate"]
        winners[survival] = {row["candidate"] for row in rows if row["won"]}
    assert winners == {"plus": {0, 1, 2}, "comma": {1, 2}}


def test_swaps_get_smaller_along_a_cosine():
    learner = sparse_learner(options("sparsae", children=1, every=10, mutation=0.4, grow="uniform"), steps=40)
    rows = [row for row in events_of(learner, 40) if row["kind"] == "candidate" and row["candidate"]]
    active = learner.update.num_active
    expected = [0.4 * active * share for share in (0.8536, 0.5, 0.1464)]  # in the last step 0, which is no event
    assert [row["swaps"] for row in rows] == pytest.approx(expected, abs=6)  # rounded in each of twelve layers


def test_the_relative_signal_sees_through_the_scales_of_units():
    shapes = {"a": torch.Size([5, 7]), "b": torch.Size([3, 4])}
    masks = Masks(shapes)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    relative = relative_signal(masks.join(base), masks)
    square = base["b"].square()
    by_hand = base["b"][1, 2].abs() / (square[1].mean() * square[:, 2].mean()).sqrt()
    assert masks.split(relative)["b"][1, 2] == pytest.approx(float(by_hand))
    base["a"][4] *= 1000
    loud = masks.join(base)[:35]
    assert set((loud.abs().topk(7).indices // 7).tolist()) == {4}
    assert len(set((relative_signal(masks.join(base), masks)[:35].topk(7).indices // 7).tolist())) > 2


def test_children_are_made_in_turn():
    made = {}
    for kinds in ({"grow": "mixed", "scope": "layer"}, {"grow": "mixed", "scope": "mixed"}, {"grow": "activity"}):
        learner = sparse_learner(options("sparsae", children=4, reset={"probability": 0.0, "batch": 4}, **kinds))
        made[str(kinds)] = [row["made"] for row in events_of(learner, 3) if row["kind"] == "candidate"][1:]
    assert list(made.values()) == [
        ["activity, layer", "uniform, layer"] * 2,
        ["activity, layer", "uniform, layer", "activity, global", "uniform, global"],
        ["activity, layer"] * 4,
    ]


def test_random_selection_scores_alike_and_lets_chance_decide():
    rows = {}
    for selection in ("ce_only", "random"):
        learner = sparse_learner(options("sparsae", children=3, selection=selection, every=1), steps=40)
        found = events_of(learner, 24)
        rows[selection] = [row for row in found if row["kind"] == "candidate"]
        winners = [row["candidate"] for row in rows[selection] if row["won"]]
        assert len(winners) == 24
        assert len(set(winners)) > 1
        best = [min((1, 2, 3), key=lambda n: rows[selection][4 * e + n]["ce"]) for e in range(24)]
        assert (winners == best) == (selection == "ce_only")
    first = [[row["ce"] for row in found[:4]] for found in rows.values()]
    assert first[0] == first[1]


def test_a_candidate_that_is_not_finite_loses(monkeypatch):
    learner = sparse_learner(options("sparsae", children=2, every=1, selection="random"))
    window, calls = learner.update.window, []
    real = window.losses

    def broken(batch, weights):
        calls.append(bool(weights))
        is_child = bool(weights) and len(calls) > 1 and calls[-2]  # the parent's turn comes after a look at stagnation
        return real(batch, weights) * (math.nan if is_child else 1)

    monkeypatch.setattr(window, "losses", broken)
    rows = [row for row in events_of(learner, 6) if row["kind"] == "candidate"]
    assert sum(calls) == 18
    assert all(row["won"] == (row["candidate"] == 0) for row in rows)
    assert all((row["ce"] is None) == (row["candidate"] > 0) for row in rows)


def test_the_literal_form_costs_a_backward_pass_for_each_candidate():
    learner = sparse_learner(options("sparsae", children=2, judge="at_once", signal="micro_batch"), new_weights="he")
    reports = [learner.step(tiny_batch(seed=step)) for step in range(1, 4)]
    forward = learner.model.forward_flops(4, 6)
    assert reports[2].cost.flops == forward.with_backward * 4 + forward.total


def connected(**section):
    update = Sparse.Config.model_validate(section).build()
    update.connect(Services(tiny_gpt(), Streams(0), Solo(), supply, 100))
    return update


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"topology": {"name": "sparsae", "mutation": 1e-6}},
            r"mutation 1e-06 of \d+ connections of the largest layer is less than one swap",
        ),
        (
            {"topology": {"name": "sparsae", "mutation": 1e-6, "scope": "global"}},
            r"mutation 1e-06 of \d+ connections in all is less than one swap; make it at least 0\.\d+",
        ),
        ({"topology": "static", "sparsity": 0.999}, r"leaves 2 of \d+ connections for 12 layers"),
        ({"topology": {"name": "sparsae", "bounds": {"min_sparsity": 0.9}}, "sparsity": 0.8}, r"allow \d+ to \d+ conn"),
    ],
)
def test_what_the_model_cannot_bear_is_refused_with_numbers(section, said):
    with pytest.raises(RecipeError, match=said):
        connected(**section)


def test_a_reset_is_several_times_a_child_in_every_event_of_a_run():
    """Unless it is told a share of its own."""
    options = SparsaeOptions(every=10)
    for step in range(0, 700, 10):
        share = options.decayed(options.mutation, step, 1000)
        child = round(share * 10_000)
        assert options.reset.count(child, 10_000) >= min(2 * child, 10_000)
    assert ResetOptions(factor=5).count(2_000, 6_000) == 6_000
    assert ResetOptions(fraction=0.2).count(child=3_000, every=10_000) == 2_000


@pytest.mark.parametrize(("initial", "share"), [("he", 1.0), ("small", 0.1)])
def test_the_first_values_have_the_standard_deviation_that_is_documented(initial, share):
    masks = Masks({"w": torch.Size([400, 100])})
    masks.draw([20_000], Streams(0))
    entries = masks.flat.nonzero().squeeze(1)
    values = first_values(entries, masks, [20_000], initial, torch.Generator().manual_seed(1))
    assert float(values.std()) == pytest.approx(share * math.sqrt(2 / (100 * 0.5)), rel=0.02)
