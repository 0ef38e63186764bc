"""One synthetic study and its page for all tests of the report."""

from pathlib import Path

import pytest

from heterodox.report import write_report
from heterodox.report.data import Study, read_study
from tests.unit.report.synthetic_study import write_study


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("report") / "study")


@pytest.fixture(scope="session")
def study(folder: Path) -> Study:
    return read_study([folder])


@pytest.fixture(scope="session")
def page(folder: Path) -> str:
    return write_report([folder], folder / "report.html").read_text(encoding="utf-8")
