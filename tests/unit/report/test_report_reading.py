"""The sentences follow from the numbers, whatever the numbers are."""

from dataclasses import replace

import pytest

from heterodox.report.data import Run, Study, headline, remarks
from heterodox.report.statistics import table

LOSSES = {"backprop": (1.0, 1.1, 1.2), "rule": (1.5, 1.62, 1.7), "head_only": (2.0, 2.1, 2.21)}


def study_of(losses: dict[str, tuple[float | None, ...]], folder, **changes: object) -> Study:
    runs = []
    for recipe, values in losses.items():
        for seed, loss in enumerate(values):
            summary = {"recipe": recipe, "credit": recipe, "seed": seed, "val_loss": loss, "tokens": 1000}
            summary |= {"status": "diverged" if loss is None else "finished", "meta_tokens": 0}
            runs.append(Run(recipe, seed, summary | changes.get(recipe, {}), folder))
    return Study(runs, "backprop" if "backprop" in losses else None, {}, [], [])


def read(study: Study, unigram: float | None = 3.0) -> tuple[str, str]:
    rows = table([run.summary for run in study.runs], study.baseline or "")
    return headline(study, rows).replace("\u202f", " "), " ".join(remarks(study, rows, unigram))


def test_gap_closed(tmp_path):
    text, more = read(study_of(LOSSES, tmp_path))
    assert text == "Of the gap between head_only (2.103) and backprop (1.100), rule closes 50 %."
    assert more == "3 seeds per recipe; intervals are 95 % (Student t), differences paired by seed."


def test_a_rule_beyond_either_end(tmp_path):
    text, more = read(study_of(LOSSES | {"better": (0.9, 1.0, 1.1), "worse": (2.3, 2.4, 2.5)}, tmp_path))
    assert "better ends below backprop (110 %)" in text
    assert "worse ends above head_only (−30 %)" in text
    assert "Not shown to train the blocks (not below head_only beyond chance): worse." in more


def test_many_rules_keep_one_sentence(tmp_path):
    rules = {f"rule{i}": (1.2 + i / 20,) * 3 for i in range(12)}
    text, _ = read(study_of(LOSSES | rules, tmp_path))
    assert text.count("closes") == 6
    assert "; 7 more: 35 % to 60 %." in text


def test_one_seed_is_said_to_be_one(tmp_path):
    text, more = read(study_of({name: values[:1] for name, values in LOSSES.items()}, tmp_path))
    assert "rule closes 50 %" in text
    assert more.startswith("One seed: no interval, so a small difference may be chance.")
    assert "Not shown to train the blocks" not in more


def test_two_seeds_are_too_few_for_a_claim(tmp_path):
    _, more = read(study_of({name: values[:2] for name, values in LOSSES.items()}, tmp_path))
    assert "at least 3 are needed for a claim" in more


def test_what_chance_may_explain(tmp_path):
    _, more = read(study_of(LOSSES | {"same": (1.02, 1.08, 1.21), "dull": (1.9, 2.2, 2.1)}, tmp_path))
    assert "Not told apart from backprop, as the interval includes 0: same." in more
    assert "not below head_only beyond chance): dull." in more


def test_worse_than_counting_tokens(tmp_path):
    _, more = read(study_of(LOSSES | {"lost": (3.1, 3.2, 3.3)}, tmp_path))
    assert "No better than guessing by token frequency alone (unigram entropy): lost." in more


def test_failures_and_unequal_budgets_are_told(tmp_path):
    losses = LOSSES | {"wild": (None, 1.5, None)}
    _, more = read(study_of(losses, tmp_path, rule={"meta_tokens": 4000}))
    assert "Left out because they failed or diverged: wild (2 of 3)." in more
    assert "did not consume equally many tokens (1\u202fk to 5\u202fk)" in more


def test_other_windows_are_told(tmp_path):
    """As in a report of two studies; the recipes of one are not compared at all."""
    study = study_of(LOSSES, tmp_path)
    config = {"model": {"context": 64}, "run": {"eval_batches": 4, "eval_batch_size": 32}}
    runs = [replace(run, config=config) for run in study.runs]
    assert "windows" not in read(replace(study, runs=runs))[1]
    whole = config | {"run": {"eval_batches": None, "eval_batch_size": 32}}
    _, more = read(replace(study, runs=[replace(runs[0], config=whole), *runs[1:]]))
    assert "Not evaluated on the same windows (all of 64 tokens; 128 of 64 tokens)" in more


def test_a_study_without_a_floor_says_so(tmp_path):
    losses = {name: values for name, values in LOSSES.items() if name != "head_only"}
    assert "No floor (head_only) in this study: the gap closed is not given." in read(study_of(losses, tmp_path))[1]
    assert "No floor" not in read(study_of(LOSSES, tmp_path))[1]
    assert "No floor" not in read(study_of({"backprop": LOSSES["backprop"]}, tmp_path))[1]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"backprop": (1.0,), "rule": (1.5,)}, "Against backprop (1.000), in nats per token: rule ends +0.500."),
        ({"rule": (1.5,)}, "Validation loss in nats per token: rule at 1.500."),
        ({"rule": (None,)}, "No run finished, so there is nothing to compare."),
        ({"backprop": (None,), "rule": (1.5,)}, "Validation loss in nats per token: rule at 1.500."),
        ({"backprop": (1.0,), "head_only": (2.0,)}, "Nothing stands yet in the gap between"),
        ({"backprop": (1.0,), "head_only": (0.9,), "rule": (1.0,)}, "The gap is not there to close"),
        ({"backprop": (1.0, None), "rule": (None, 1.5)}, "rule ends at 1.500, on other seeds."),
    ],
)
def test_incomplete_studies(tmp_path, losses: dict, expected: str):
    assert expected in read(study_of(losses, tmp_path))[0]


def test_without_a_baseline_nothing_is_paired(study: Study):
    text, _ = read(replace(study, baseline=None))
    assert text.startswith("Validation loss in nats per token: backprop at 1.8")
