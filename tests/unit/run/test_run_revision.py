"""The commit that a run's code comes from."""

import shutil
import subprocess

import pytest

from heterodox.app.train import commit, train
from tests.tiny import tiny_recipe

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not there")


def git(folder, *arguments):
    done = subprocess.run(["git", *IDENTITY, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@needs_git
def test_it_is_the_checkouts_and_tells_of_changes(tmp_path):
    source = tmp_path / "checkout" / "package"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("x = 1\n")
    assert commit(source) is None
    git(tmp_path / "checkout", "init", "-q")
    commit.cache_clear()
    assert commit(source) is None  # installed into a folder of somebody else's repository
    git(source, "add", ".")
    git(source, "commit", "-qm", "first")
    commit.cache_clear()
    head = commit(source)
    assert head is not None
    assert git(source, "rev-parse", "HEAD").startswith(head)
    (source / "__init__.py").write_text("x = 2\n")
    assert commit(source) == head, "what it was when first asked"
    commit.cache_clear()
    assert commit(source) == head + "+"
    (source.parent / "README.md").write_text("not code\n")
    git(source, "checkout", "-q", ".")
    commit.cache_clear()
    assert commit(source) == head


def test_without_git_there_is_none(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    commit.cache_clear()
    assert commit() is None
    commit.cache_clear()


def test_a_summary_says_it(monkeypatch, tmp_path):
    monkeypatch.setattr("heterodox.app.train.commit", lambda: "0123456789ab+")
    assert train(tiny_recipe(run={"budget": {"steps": 1}}), tmp_path / "run").summary["commit"] == "0123456789ab+"
