"""Who wins in an event of Sparsae, and that its swaps keep the count where there is little room."""

import pytest
import torch

from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.update import Sparse
from tests.tiny import tiny_gpt, tiny_recipe
from tests.tiny_sparse import events_of, options, sparse_learner


@pytest.mark.parametrize("grow", ["activity", "mixed"])
def test_a_nearly_dense_network_keeps_its_count(grow):
    """Where a layer has less room than its share, fewer go, and all that go may come back."""
    section = {"children": 3, "every": 1, "grow": grow, "mutation": 0.9, "reset": {"probability": 0.0, "batch": 4}}
    learner = sparse_learner(options("sparsae", **section), steps=20, sparsity=0.2)
    before = learner.update.masks.counts()
    rows = [row for row in events_of(learner, 12) if row["kind"] == "candidate"]
    assert learner.update.masks.counts() == before
    assert sum(row["swaps"] for row in rows if row["won"]) > 40


@pytest.mark.parametrize("survival", ["comma", "plus"])
def test_another_than_the_favourite_wins_by_the_margin_alone(survival, monkeypatch):
    """The favourite is the first that may win; a lead is counted in standard errors over windows, by hand."""
    section = {"children": 3, "every": 1, "selection": "ce_only", "survival": survival, "margin": 1.5}
    learner = sparse_learner(options("sparsae", **section), steps=40)
    window, seen = learner.update.window, []
    real = window.losses
    monkeypatch.setattr(window, "losses", lambda batch, weights: seen.append(real(batch, weights)) or seen[-1])
    rows = [row for row in events_of(learner, 30) if row["kind"] == "candidate"]
    first = 0 if survival == "plus" else 1
    held_back = displaced = 0
    for event in range(30):
        group, losses = rows[4 * event : 4 * event + 4], seen[5 * event : 5 * event + 4]
        may_win = [first]
        for number in range(first + 1, 4):
            ahead = losses[first] - losses[number]
            by_hand = float(ahead.mean() / (ahead.std() / 2).clamp(min=1e-30))  # of four windows
            assert group[number]["lead"] == pytest.approx(by_hand, rel=1e-6)
            may_win += [number] * (by_hand > 1.5)
        winner = min(may_win, key=lambda number: group[number]["ce"])
        assert group[winner]["won"], event
        displaced += winner != first
        held_back += winner != min(range(first, 4), key=lambda number: group[number]["ce"])
    assert displaced > 0
    assert held_back > 0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"judge": "at_once", "signal": "micro_batch"}, r"margin 2\.0 compares losses window by window"),
        ({"micro_batch": 1}, r"update\.topology\.micro_batch is 1; make that at least 2, or set margin: 0"),
    ],
)
def test_a_margin_that_cannot_be_measured_is_refused(section, said):
    for margin in ({}, {"margin": 0.0}):
        topology = {"name": "sparsae", "every": 2, "until": 1.0, "mutation": 0.1, "bounds": {"min_sparsity": 0.1}}
        update = {"name": "sparse", "sparsity": 0.4, "burn_in": {"steps": 1}, "topology": topology | section | margin}
        if margin:
            tiny_recipe(update=update)
        else:
            with pytest.raises(RecipeError, match=said):
                tiny_recipe(update=update)


@pytest.mark.parametrize("survival", ["comma", "plus"])
def test_what_may_win_without_a_lead_is_no_reset(survival):
    """However likely resets are, the first child that takes the parent's place is none; the others are."""
    section = {"children": 3, "every": 1, "survival": survival, "margin": 1e30}
    section["reset"] = {"probability": 1.0, "boosted": 1.0, "batch": 4}
    learner = sparse_learner(options("sparsae", **section), steps=20)
    rows = [row for row in events_of(learner, 10) if row["kind"] == "candidate"]
    may_win = 0 if survival == "plus" else 1
    assert [row["reset"] for row in rows[:4]] == [number > may_win for number in range(4)]
    assert {row["candidate"] for row in rows if row["won"]} == {may_win}


def test_how_often_children_win_is_counted_by_what_they_win_against():
    learner = sparse_learner(options("sparsae", children=3, every=1, margin=0.5), steps=20)
    events = events_of(learner, 15)
    rows = [row for row in events if row["kind"] == "candidate"]
    (told,) = [row for row in events if row["kind"] == "mask"][-1:]
    groups = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    winners = [next(row for row in group if row["won"]) for group in groups]
    below = sum(winner["ce"] < group[0]["ce"] for winner, group in zip(winners, groups, strict=True))
    upsets = sum(winner["candidate"] != 1 for winner in winners)
    assert 0 < upsets < 15
    assert below > 0
    assert (told["child_wins"], told["below_parent"], told["upsets"]) == (1.0, below / 15, upsets / 15)


def test_swaps_anywhere_are_counted_in_all_not_rounded_layer_by_layer():
    learner = sparse_learner(
        options("sparsae", children=1, every=1, scope="global", mutation=0.004, grow="uniform"), steps=1000
    )
    active = learner.update.num_active
    assert all(round(0.004 * count) == 0 for count in learner.update.masks.counts())
    rows = [row for row in events_of(learner, 2) if row["kind"] == "candidate" and row["candidate"]]
    assert [row["swaps"] for row in rows] == [round(0.004 * active)] * 2 != [0, 0]


@pytest.mark.parametrize("topology", ["static", "magnitude", "set", "rigl", "sparsae"])
def test_without_a_learner_a_topology_works_or_says_what_it_lacks(topology):
    model = tiny_gpt()
    update = Sparse.Config.model_validate({"topology": options(topology), "burn_in": {"steps": 0}}).build()
    update.connect(Services(model, Streams(0), Solo(), steps=30))
    parameters = dict(model.named_parameters())
    update.begin(parameters)

    def walk() -> None:
        for _ in range(3):
            update.apply(parameters, {name: torch.ones_like(p) for name, p in parameters.items()})

    if topology == "sparsae":
        with pytest.raises(RecipeError, match="without a window on its losses"):
            walk()
    else:
        walk()
        assert bool((parameters["blocks.0.mlp.fc.weight"] == 0).any())
