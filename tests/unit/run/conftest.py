"""A run that other tests look at."""

from pathlib import Path

import pytest

from heterodox.app.train import train
from tests.tiny_rater import rater_recipe


@pytest.fixture(scope="session")
def trained_rater(tmp_path_factory) -> Path:
    """The folder of a finished run that meta-trained a rater."""
    folder = tmp_path_factory.mktemp("rater") / "run"
    assert train(rater_recipe(), folder).summary["status"] == "finished"
    return folder
