"""Charts, one self-contained HTML page and Markdown about finished runs, made from their files alone."""

from heterodox.report.page import write_figures, write_markdown, write_report

__all__ = ["write_figures", "write_markdown", "write_report"]
