"""The share of the gap that a rule closes, at equal tokens, FLOPs and seconds."""

from dataclasses import replace

import pytest

from heterodox.report.data import Study
from heterodox.report.series import curves
from heterodox.report.tables import gaps


def _study(curves_: dict[str, list[tuple[float, float]]], study: Study) -> Study:
    """Runs with these (FLOPs, loss) evaluations; an evaluation costs a hundred tokens more than the last."""
    runs = []
    for name, points in curves_.items():
        run = study.of(name)[0]
        evals = [
            {"step": i, "tokens": 100 * i, "flops": flops, "seconds": float(i), "val_loss": loss}
            for i, (flops, loss) in enumerate(points)
        ]
        runs.append(replace(run, evals=evals))
    return replace(study, runs=runs)


POINTS = {
    "backprop": [(0, 4.0), (100, 3.0), (200, 2.0)],
    "head_only": [(0, 4.0), (50, 3.5), (100, 3.0)],
    "direct_feedback": [(0, 4.0), (150, 2.75), (300, 2.5)],
}


def test_shares_are_taken_at_equal_cost(study: Study):
    mine = _study(POINTS, study)
    rows = gaps(mine, curves(mine)["means"])["gaps"]
    assert {row["recipe"] for row in rows} == {"direct_feedback"}
    tokens = {row["step"]: row["share"] for row in rows if row["kind"] == "tokens"}
    assert tokens == pytest.approx({1: (3.5 - 2.75) / (3.5 - 3.0), 2: (3.0 - 2.5) / (3.0 - 2.0)})
    flops = [(row["cost"], row["share"]) for row in rows if row["kind"] == "flops"]
    # at 150 FLOPs backprop is half-way between 3 and 2, and head_only keeps its last 3; backprop never saw 300
    assert flops == [(150, pytest.approx((3.0 - 2.75) / (3.0 - 2.5)))]


def test_no_share_without_a_gap_or_without_its_ends(study: Study):
    level = _study({**POINTS, "head_only": POINTS["backprop"]}, study)
    assert gaps(level, curves(level)["means"])["gaps"] == []
    alone = _study({name: POINTS[name] for name in ("backprop", "direct_feedback")}, study)
    assert gaps(alone, curves(alone)["means"])["gaps"] == []


def test_the_page_draws_the_shares_only_where_there_are_any(page: str):
    assert '"gap/tokens/linear"' in page
    assert 'id="chart-gap"' in page
