from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from heterodox.core.rng import Streams
from heterodox.data import Split


@pytest.fixture(autouse=True)
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the user's own cache."""
    monkeypatch.setenv("HETERODOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def streams() -> Streams:
    return Streams(7)


@pytest.fixture(scope="session")
def counting_split() -> Callable[..., Split]:
    """A split whose tokens are 0, 1, 2, …, so that a window tells where it came from."""

    def make(num_tokens: int, name: str = "train") -> Split:
        return Split(name, np.arange(num_tokens, dtype=np.uint16), num_tokens)

    return make
