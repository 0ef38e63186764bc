"""Numbers as people read them."""

from collections.abc import Mapping
from typing import Any


def duration(seconds: int | float) -> str:
    """`47s`, `3m 20s`, `2h 05m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


def size(num_bytes: int | float | None) -> str:
    """Bytes in powers of 1000."""
    if num_bytes is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def count(value: int | float | None) -> str:
    """`812 k`, `3.96 G`, `1.2e+15` beyond tera."""
    if value is None:
        return ""
    for factor, unit in ((1, ""), (1e3, " k"), (1e6, " M"), (1e9, " G"), (1e12, " T")):
        text = f"{value / factor:.3g}"
        if float(text) < 1000:
            return text + unit
    return f"{value:.3g}"


def number(value: int | float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: int | float | Mapping[str, Any] | None) -> str:
    if isinstance(value, Mapping):
        value = value["mean"]
    return "" if value is None else f"{100 * value:.0f} %"


def interval(value: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """`1.862 ± 0.004`: mean and half the width of the interval, if there is one."""
    if value is None or value.get("mean") is None:
        return ""
    mean = f"{value['mean']:+.3f}" if sign else f"{value['mean']:.3f}"
    if value.get("high") is None:
        return mean
    return f"{mean} ± {(value['high'] - value['low']) / 2:.3f}"
