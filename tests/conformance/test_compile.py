"""Every rule gives the same signal when the model is compiled."""

import subprocess
import sys

import pytest

from tests.conformance.combinations import CREDITS
from tests.switches import SWITCHES


@pytest.mark.slow
def test_signal_of_a_compiled_model():
    command = [sys.executable, "-m", "tests.conformance.compile_worker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*CREDITS, *SWITCHES]
