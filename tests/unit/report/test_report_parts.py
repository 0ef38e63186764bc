"""The numbers behind the charts, the manifest's grid, recipe differences and units."""

import math
from dataclasses import replace

import pytest

from heterodox.report import units
from heterodox.report.charts import DARK, LIGHT, styles
from heterodox.report.data import Study
from heterodox.report.facts import facts
from heterodox.report.series import alignment, by_depth, curves, first_to_show, norm_bound, span, thin
from heterodox.report.statistics import interval
from heterodox.report.tables import origins, recipes


def test_mean_curve_is_the_mean_of_finished_seeds(study: Study):
    means = [row for row in curves(study)["means"] if row["recipe"] == "feedback_alignment"]
    assert [row["step"] for row in means] == list(range(0, 2001, 50))
    losses = [run.evals[-1]["val_loss"] for run in study.of("feedback_alignment")]
    expected = interval(losses)
    last = means[-1]
    assert (last["loss"], last["low"], last["high"]) == pytest.approx((expected.mean, expected.low, expected.high))
    seconds = [run.evals[-1]["seconds"] for run in study.of("feedback_alignment")]
    assert last["seconds"] == pytest.approx(sum(seconds) / 3)


def test_a_diverged_run_is_drawn_and_marked_but_not_averaged(study: Study):
    data = curves(study)
    means = [row for row in data["means"] if row["recipe"] == "sign_symmetry"]
    assert {row["n"] for row in means} == {2}
    assert {row["low"] for row in means} == {None}
    (end,) = data["ends"]
    assert (end["recipe"], end["seed"], end["step"], end["status"]) == ("sign_symmetry", 2, 1200, "diverged")


def test_tokens_are_charged_with_meta_tokens(study: Study):
    run = study.runs[0]
    charged = replace(run, evals=[row | {"meta_tokens": 500} for row in run.evals])
    rows = curves(replace(study, runs=[charged]))["seeds"]
    assert rows[1]["tokens"] == run.evals[1]["tokens"] + 500


def test_non_finite_losses_never_reach_a_curve(study: Study):
    run = study.runs[0]
    bad = [row | {"val_loss": value} for row, value in zip(run.evals, [math.nan, math.inf, None], strict=False)]
    rows = curves(replace(study, runs=[replace(run, evals=[*bad, *run.evals[3:]])]))["seeds"]
    assert [row["step"] for row in rows] == list(range(150, 2001, 50))


def test_long_curves_are_thinned_to_their_ends():
    rows = list(range(100_000))
    thinned = thin(rows, 600)
    assert (len(thinned), thinned[0], thinned[-1]) == (600, 0, 99_999)
    assert thinned == sorted(set(thinned))
    assert thin(rows[:600], 600) == rows[:600]


@pytest.mark.parametrize(
    ("values", "expected"), [([], None), ([None, math.nan], None), ([1.0, 3.0], (0.8, 3.2)), ([2.0], (1.98, 2.02))]
)
def test_span(values: list, expected: tuple | None):
    found = span(values, margin=0.1)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_alignment_is_averaged_over_finished_seeds(study: Study):
    found = alignment(study)
    assert list(found) == ["backprop", "sign_symmetry", "feedback_alignment", "direct_feedback"]
    entry = found["sign_symmetry"]
    assert entry["steps"] == list(range(0, 2001, 200))
    assert entry["parameters"][0] == "tok_emb.weight"
    assert entry["parameters"][-1] == "head.weight"
    assert not any("ln_" in name for name in entry["parameters"])  # nobody measured those
    assert entry["starts"][0] == "blocks.0.attn.q.weight"
    assert entry["starts"][-1] == "head.weight"
    name, step = "blocks.2.attn.v.weight", 3
    probes = [run.probes[step]["alignment"][name] for run in study.of("sign_symmetry") if run.finished]
    row = entry["parameters"].index(name)
    assert entry["cosine"][row][step] == pytest.approx(sum(p["cosine"] for p in probes) / 2, rel=1e-3)
    geometric = math.sqrt(probes[0]["norm_ratio"] * probes[1]["norm_ratio"])
    assert entry["norm_ratio"][row][step] == pytest.approx(geometric, rel=1e-3)


def test_norm_bound_is_a_power_of_ten():
    assert norm_bound({}) == 10
    assert norm_bound({"a": {"norm_ratio": [[0.02, None, 3.0]]}}) == 100
    assert norm_bound({"a": {"norm_ratio": [[1e9]]}}) == 1000


def test_the_map_that_is_shown_first_is_not_that_of_the_gradient(study: Study):
    assert next(iter(alignment(study))) == "backprop"
    assert first_to_show(alignment(study)) == "sign_symmetry"
    assert first_to_show({"backprop": {"cosine": [[1.0, None]]}}) == "backprop"
    assert first_to_show({}) is None


def test_depth_orders_parameters_as_the_signal_passes_them():
    names = ["head.weight", "ln_f.bias", "blocks.10.attn.q.weight", "blocks.2.ln1.weight", "pos_emb.weight"]
    assert by_depth(names) == list(reversed(names))


def test_origins_fold_equal_blocks_into_one_row(study: Study):
    found = origins(study)
    rows = {row["name"]: row["cells"] for row in found["rows"]}
    assert next(iter(rows)) == "tok_emb"
    assert list(rows)[-1] == "head"
    assert rows["blocks.*.attn.q"][:2] == [[("backprop", "")], [("feedback", "")]]
    assert [origin for origin, _ in found["legend"]] == ["exact", "backprop", "feedback", "frozen"]
    shares = dict(found["recipes"][-1]["shares"])
    assert shares["exact"] + shares["frozen"] == pytest.approx(1)


def test_origins_tell_blocks_and_parts_that_differ(study: Study):
    def manifest(**entries: str) -> dict:
        return {name.replace("__", "."): {"origin": origin, "size": 1} for name, origin in entries.items()}

    parameters = manifest(
        blocks__0__fc__weight="feedback",
        blocks__1__fc__weight="feedback",
        blocks__2__fc__weight="exact",
        blocks__3__fc__weight="feedback",
        blocks__0__ln__weight="frozen",
        blocks__0__ln__bias="exact",
    )
    run = replace(study.runs[0], manifest={"parameters": parameters})
    rows = {row["name"]: row["cells"][0] for row in origins(replace(study, runs=[run]))["rows"]}
    assert rows["blocks.*.fc"] == [("feedback", "0–1, 3"), ("exact", "2")]
    assert rows["blocks.*.ln"] == [("frozen", "weight"), ("exact", "bias")]


def test_differences_name_only_what_differs(study: Study):
    entries = {entry["recipe"]: entry for entry in recipes(study)}
    assert entries["backprop"]["differences"] == []
    assert entries["feedback_alignment"]["differences"] == [
        ("credit.name", "backprop", "feedback_alignment"),
        ("update.lr", "0.001", "0.0003"),
        ("credit.feedback", "", "orthogonal"),
    ]
    assert "lr: 0.0003" in entries["head_only"]["yaml"]


def test_every_recipe_has_its_own_look(study: Study):
    many = replace(study, runs=[replace(study.runs[0], recipe=f"rule {i}") for i in range(24)], baseline=None)
    looks = [(s["light"], s["dark"], tuple(s["dash"])) for s in styles(many)]
    assert len(set(looks)) == 24
    assert [s["light"] for s in styles(study)][1:4] == list(LIGHT[:3])
    assert [s["dark"] for s in styles(study)][1:4] == list(DARK[:3])


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.count(999_600), "1 M"),
        (units.count(1234), "1.23 k"),
        (units.count(0), "0"),
        (units.count(3.28e12), "3.28 T"),
        (units.count(None), "–"),
        (units.count(math.nan), "–"),
        (units.memory(7_340_000), "7.34 MB"),
        (units.duration(12.34), "12.3 s"),
        (units.duration(200.2), "3 min 20 s"),
        (units.duration(3_900), "1 h 5 min"),
        (units.loss(-0.5), "−0.500"),
        (units.signed(0.1234), "+0.123"),
        (units.percent(0.337), "34 %"),
        (units.percent(-0.05), "−5 %"),
        (units.visible("a\x1b\n\t\x00"), "a\\x1b\n\t\\x00"),
        (units.breakable("a_<b>"), "a_<wbr>&lt;b&gt;"),
    ],
)
def test_units(shown: str, expected: str):
    assert shown.replace("\u202f", " ") == expected


def test_the_commits_of_the_runs_are_told(study: Study):
    assert dict(facts(study))["Commit"] == ["not recorded"]
    found = ["0123456789ab", "ba9876543210+", *[None] * (len(study.runs) - 2)]
    told = [replace(r, summary=r.summary | {"commit": c}) for r, c in zip(study.runs, found, strict=True)]
    assert dict(facts(replace(study, runs=told)))["Commit"] == ["0123456789ab, ba9876543210+, not recorded"]


def test_the_setting_has_all_values_of_the_recipes(study: Study):
    def entry(steps: int, layers: int) -> dict:
        budget = {"steps": steps, "tokens": None}
        model = {"name": "gpt", "layers": layers, "width": 64}
        return {"resolved": {"model": model, "run": {"batch_size": 12, "budget": budget}}}

    assert "Setting" not in dict(facts(study))
    recipes = [entry(2000, 4), entry(345, 4), entry(5886, 1), entry(2359, 4)]
    told = replace(study, headers=[{"recipes": recipes[:2]}, {"recipes": recipes[2:]}])
    assert dict(facts(told))["Setting"] == ["gpt, layers 4 or 1, width 64, batch 12, steps 345 to 5,886"]
