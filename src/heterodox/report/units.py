"""Numbers as people read them: three significant digits, SI prefixes, a true minus, a dash for a gap."""

import re

from markupsafe import Markup, escape

from heterodox.report.statistics import Number, is_finite

MISSING = "–"
THIN = "\u202f"
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
SURROGATES = dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def count(value: Number | None, unit: str = "") -> str:
    """`1234567` as `1.23 M`, with `unit` behind the prefix."""
    if not is_finite(value):
        return MISSING
    size, prefix = float(value), 0
    while abs(size) >= 999.5 and prefix < len(PREFIXES) - 1:
        size, prefix = size / 1000, prefix + 1
    suffix = PREFIXES[prefix] + unit
    return _sign(f"{size:.3g}" + (THIN + suffix if suffix else ""))


def memory(value: Number | None) -> str:
    """Bytes as kB, MB, GB (powers of 1000)."""
    return count(value, "B")


def duration(value: Number | None) -> str:
    """Seconds as `12.3 s`, `3 min 20 s` or `1 h 5 min`."""
    if not is_finite(value):
        return MISSING
    seconds = float(value)
    if seconds < 99.5:
        return f"{seconds:.3g}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest}{THIN}s"
    return f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"


def loss(value: Number | None) -> str:
    """Nats or bits with three decimals."""
    return _sign(f"{value:.3f}") if is_finite(value) else MISSING


def signed(value: Number | None) -> str:
    """A difference with its sign and three decimals."""
    return _sign(f"{value:+.3f}") if is_finite(value) else MISSING


def percent(value: Number | None) -> str:
    """A share of one as whole percents."""
    if not is_finite(value):
        return MISSING
    return _sign(f"{round(100 * value)}{THIN}%")


def visible(text: object) -> str:
    """A model's text as something that HTML can hold: control characters are written as \\x1b."""
    return str(text).translate(CONTROLS)


def breakable(name: str) -> Markup:
    """A name that may be broken after its underscores and dots."""
    return Markup(re.sub(r"([_.])", r"\1<wbr>", str(escape(name))))


def _sign(text: str) -> str:
    return text.replace("-", "−")
