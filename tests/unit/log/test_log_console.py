"""What a person reads in the terminal: nothing is cut, at any width."""

import io

import pytest
from rich.console import Console

from heterodox.cli.console import FinalTable, alignment_table, comparison_summary, explanation, training_summary


def interval(mean: float, half: float | None = 0.012) -> dict:
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


def table_row(recipe: str, loss: float | None, **more) -> dict:
    known = None if loss is None else interval(loss)
    return {
        "recipe": recipe, "seeds": 3, "failed": 0, "val_loss": known, "difference": known, "gap_closed": 0.5,
        "test_loss": known, "val_bits_per_byte": 2.5, "flops": 1.68e9, "seconds": 3.4, "activation_bytes": 292_000,
    } | more  # fmt: skip


ROWS = [
    table_row("backprop", 1.86),
    table_row("feedback_alignment", 2.145),
    table_row("boom", None, seeds=0, failed=3, gap_closed=None, val_bits_per_byte=None, flops=None, seconds=None),
]


def lines(renderable, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable, highlight=False)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_final_table_is_readable_at_any_width(width):
    text = lines(FinalTable(ROWS, "backprop"), width)
    assert all(len(line) <= width for line in text)
    assert "…" not in "\n".join(text)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_what_matters_most_is_always_there(width):
    text = lines(FinalTable(ROWS, "backprop"), width)
    header, (first, second, third) = text[0], text[2:5]
    for column in ("rule", "val loss", "− backprop", "gap closed", "FLOPs", "seconds"):
        assert column in header
    assert first.split()[:4] == ["backprop", "1.860", "±", "0.012"]
    assert second.split()[:7] == ["feedback_alignment", "2.145", "±", "0.012", "+2.145", "±", "0.012"]
    assert third.split()[:3] == ["boom", "none", "finished"]


def test_columns_that_do_not_fit_are_named():
    left_out = {width: lines(FinalTable(ROWS, "backprop"), width)[-1] for width in (80, 110)}
    assert left_out[80] == "(left out for want of width: bits/byte, test loss, held, seeds)"
    assert left_out[110] == "(left out for want of width: bits/byte, test loss)"
    wide = lines(FinalTable(ROWS, "backprop"), 160)
    assert "test loss" in wide[0]
    assert wide[-1].endswith("0, 3 failed")


def test_the_summary_of_a_comparison_says_what_went_wrong(tmp_path):
    runs = [
        {
            "recipe": "backprop",
            "seed": 0,
            "status": "finished",
            "message": None,
            "floor_loss": 1.1,
            "unigram_loss": 1.9,
        },
        {"recipe": "boom", "seed": 0, "status": "diverged", "message": "The loss became nan at step 2."},
        {"recipe": "slow", "seed": 0, "status": "interrupted", "message": None},
    ]
    results = {
        "runs": runs, "seeds": [0], "table": ROWS, "baseline": "backprop", "elapsed_seconds": 61, "interrupted": 2,
    }  # fmt: skip
    text = lines(comparison_summary(results, tmp_path), 200)
    assert "nats per token; unigram 1.900, entropy floor 1.100; 95 % intervals over 3 seeds" in text
    assert "boom seed 0 diverged: The loss became nan at step 2." in text
    assert "slow seed 0 interrupted" in text
    assert "the same command goes on from here" in text
    assert text[-1] == f"1m 01s in all; report: {tmp_path / 'report.html'}"


def test_the_summary_of_a_run(tmp_path):
    summary = {
        "recipe": "tiny", "seed": 1, "status": "interrupted", "steps": 40, "val_loss": 1.5, "val_bits_per_byte": 2.1,
        "unigram_loss": 1.9, "flops": 2_000_000, "seconds": 61.0,
    }  # fmt: skip
    first, second, third = training_summary(summary, tmp_path).splitlines()
    assert first == "tiny seed 1: interrupted after 40 steps; --resume goes on from here"
    assert second == "val loss 1.500 nats per token (2.100 bits per byte; unigram 1.900)"
    assert third == f"2 MFLOPs, 1m 01s of training; {tmp_path}"


def test_an_undefined_measure_is_a_blank():
    row = {"parameter": "head.weight", "cosine": None, "norm_ratio": 1.0, "sign_agreement": 0.5}
    assert "1.000" in "\n".join(lines(alignment_table([row]), 80))
    assert "None" not in "\n".join(lines(alignment_table([row]), 80))


def test_an_explanation_is_wrapped_by_the_terminal_and_equations_are_left_alone():
    documentation = "A rule: one\nthing.\n\n    a = b\n    c = d\n\n- first,\n  item\n\nReference: [1] a long line"
    options = [{"name": "lr", "type": "float", "default": 0.1, "description": "rate"}]
    part = {
        "slot": "credit", "name": "rule", "documentation": documentation, "options": options,
        "manifest": {"head.weight": "exact"},
    }  # fmt: skip
    text = lines(explanation(part), 80)
    for line in ("A rule: one thing.", "    a = b", "    c = d", "- first,", "  item", "Reference: [1] a long line"):
        assert line in text
    assert "where each parameter's signal comes from" in text
