"""The page on Python: its examples run, and every public name is on it."""

import re
from pathlib import Path

import pytest
import torch

import heterodox as hx

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_public_name_is_on_the_page():
    assert {name for name in hx.__all__ if f"`{name}`" not in PAGE} == set()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(PAGE):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert "did you mean 'lr'" in capsys.readouterr().out
    assert (tmp_path / "runs" / "dfa.html").exists()
    assert (tmp_path / "runs" / "sweep" / "best" / "direct_feedback.yaml").exists()
    tokens, grads, found = names["tokens"], names["grads"], names["found"]
    assert isinstance(tokens, torch.Tensor)
    assert tokens.tolist() == list(b"def ")
    assert isinstance(grads, dict)
    assert all(gradient.norm() > 0 for gradient in grads.values())
    assert len(grads) == 4
    assert min(float(gradient.norm()) for gradient in found.grads) > 0  # pyrefly: ignore[missing-attribute]


def test_so_does_the_readmes_of_a_network():
    (block,) = [text for text in blocks((ROOT / "README.md").read_text(encoding="utf-8")) if "feedback_path" in text]
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    net = names["net"]
    assert isinstance(net, torch.nn.Module)
    assert all(parameter.grad is not None for parameter in net.parameters())
