"""Numbers as people read them."""

import pytest

from heterodox.core import units


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (200, "3m 20s"), (3599.6, "1h 00m"), (7500, "2h 05m")],
)
def test_durations(seconds, text):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(None, ""), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (10**6, "1.0 MB"),
     (3 * 10**9, "3.0 GB"), (4 * 10**12, "4.0 TB")],
)  # fmt: skip
def test_sizes(amount, text):
    assert units.size(amount) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (None, ""),
        (0, "0"),
        (999, "999"),
        (812_000, "812 k"),
        (999_999, "1 M"),
        (3.96e9, "3.96 G"),
        (999e12, "999 T"),
        (1.2e15, "1.2e+15"),
    ],
)
def test_counts(amount, text):
    assert units.count(amount) == text


def test_intervals():
    both = {"mean": 1.8621, "low": 1.8581, "high": 1.8661}
    assert units.interval(both) == "1.862 ± 0.004"
    assert units.interval(both, sign=True) == "+1.862 ± 0.004"
    assert units.interval({"mean": -0.5, "low": None, "high": None}, sign=True) == "-0.500"
    assert units.interval(None) == ""
    assert units.percent(0.514) == "51 %"
    assert units.percent({"mean": -0.5}) == "-50 %"
    assert units.percent(None) == ""
    assert units.number(None) == ""
    assert units.number(1.23456, 1) == "1.2"
