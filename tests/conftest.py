"""What all tests share: run-time shape checks, one thread, a token cache of their own, a tiny recipe."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

hook = install_import_hook("heterodox", "beartype.beartype")

import torch  # noqa: E402  (the hook must come before heterodox is imported)

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache for this test run, for child processes too."""
    os.environ["HETERODOX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
