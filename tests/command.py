"""The command line, called as a user calls it: in this process, or in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from heterodox.__main__ import main
from tests.tiny import tiny_recipe


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code and what it said."""

    code: int
    out: str
    err: str


def heterodox(*arguments: object) -> Answer:
    """`heterodox ARGUMENTS` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["heterodox", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return Answer(code, out.getvalue(), err.getvalue())


def launch(
    *arguments: object, python: tuple[str, ...] = ("-m", "heterodox"), **environment: str
) -> subprocess.Popen[str]:
    """`heterodox ARGUMENTS` in a process of its own, on one thread; `python` is what the interpreter is to run."""
    return subprocess.Popen(
        [sys.executable, *python, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def answer_of(process: subprocess.Popen[str], timeout: float = 60) -> Answer:
    out, err = process.communicate(timeout=timeout)
    return Answer(process.returncode, out, err)


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], interval: float = 0.01, limit: float = 120
) -> None:
    """Wait for `condition`. Fails where `process` ends before, or nothing happens for `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        if interval:
            time.sleep(interval)


def refused(answer: Answer, *phrases: str) -> None:
    """Assert: exit code 2, nothing on standard output, and one line on standard error that holds `phrases`."""
    assert answer.code == 2, answer
    assert not answer.out, answer
    assert answer.err.startswith("heterodox: "), answer
    assert answer.err.count("\n") == 1, answer
    for phrase in phrases:
        assert phrase in answer.err, answer


def recipe_file(folder: Path, name: str = "tiny", **sections: Any) -> Path:
    """The tiny recipe with `sections` over it, as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(tiny_recipe(**({"name": name} | sections)).to_yaml())
    return path
