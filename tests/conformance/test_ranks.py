"""Two ranks on half batches are one rank on the whole batch, for every rule with every update."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from heterodox.app.train import train
from heterodox.training.metrics import read_rows
from tests.command import Answer, answer_of, recipe_file, wait_until
from tests.conformance.combinations import RESUMING_PAIRS
from tests.saved import tensors, timeless
from tests.tiny import tiny_recipe

ROOT = Path(__file__).parents[2]
SETTINGS = {"run": {"precision": "float64", "budget": {"steps": 80}, "checkpoint_every": 30}}


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    """Two ranks of a script or a module, with warnings as errors."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *map(str, arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[list]:
    """What the worker printed."""
    worker = torchrun("tests/conformance/ranks_worker.py", tmp_path_factory.mktemp("worker"))
    answer = answer_of(worker, timeout=300)
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


@pytest.mark.parametrize("pair", RESUMING_PAIRS)
def test_two_ranks_follow_one(pair, measured):
    apart, moved = next(line[2:] for line in measured if tuple(line[:2]) == pair)
    assert apart < 1e-12
    assert moved > 1e-2


def test_ranks_whose_clocks_differ_stop_together(measured):
    steps, weights = measured[0]
    assert (steps, weights) == (0, 0.0)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, Answer, Answer]:
    """A run by two ranks that was sent SIGTERM and went on: its folder, and what both halves said."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe, out = recipe_file(folder, **SETTINGS), folder / "run"
    arguments = ("-m", "heterodox", "train", recipe, "--out", out)
    first = torchrun(*arguments)
    wait_until(lambda: any(row["step"] >= 15 for row in read_rows(out / "metrics.jsonl")), first)
    first.send_signal(signal.SIGTERM)
    stopped = answer_of(first)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert 15 <= summary["steps"] < 80
    assert (out / "checkpoints" / f"step-{summary['steps']:08d}").is_dir()
    return out, stopped, answer_of(torchrun(*arguments, "--resume"))


def test_sigterm_stops_all_ranks_with_a_checkpoint(ended):
    _, stopped, _ = ended
    assert stopped.out.count("interrupted after") == 1
    assert "heterodox: " not in stopped.err
    assert "Traceback" not in stopped.err.partition("torch/distributed")[0]


def test_the_run_of_two_ranks_is_the_run_of_one(ended, tmp_path):
    out, _, answer = ended
    assert answer.code == 0, answer
    alone = train(tiny_recipe(**SETTINGS), tmp_path / "alone").summary
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ranks"] == 2
    for key in ("status", "steps", "tokens", "meta_tokens", "flops", "parameters", "corpus_sha256"):
        assert summary[key] == alone[key], key
    for key in ("val_loss", "test_loss", "unigram_loss"):
        assert summary[key] == pytest.approx(alone[key], abs=1e-12), key
    mine, other = tensors(out), tensors(tmp_path / "alone")
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert (tensor - other[name]).abs().max() < 1e-12, name
    assert (tmp_path / "alone" / "samples.json").read_text() == (out / "samples.json").read_text()


def test_only_one_rank_writes_and_speaks(ended, tmp_path):
    out, _, answer = ended
    rows = timeless(out)
    assert [(row["kind"], row["step"]) for row in rows] == sorted(
        ((row["kind"], row["step"]) for row in rows), key=lambda pair: (pair[1], pair[0] == "eval")
    )
    assert len({(row["kind"], row["step"]) for row in rows}) == len(rows)
    assert {path.name for path in out.iterdir()} == {
        ".lock", "checkpoints", "manifest.json", "metrics.jsonl", "recipe.yaml", "samples.json", "summary.json",
        "tokenizer",
    }  # fmt: skip
    assert answer.out.count("finished after 80 steps") == 1
    assert len(answer.out.splitlines()) == 3
    assert all(line.startswith("tiny: step ") for line in answer.err.splitlines()), answer.err
