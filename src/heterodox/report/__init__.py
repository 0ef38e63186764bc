"""Charts and one self-contained HTML page about finished runs, made from their files alone."""

from heterodox.report.page import write_report

__all__ = ["write_report"]
