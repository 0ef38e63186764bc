"""All checks of one recipe."""

import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from heterodox.conformance.checks import CHECKS
from heterodox.conformance.violation import Violation
from heterodox.core.errors import HeterodoxError
from heterodox.recipe import Recipe


@dataclass(frozen=True)
class Outcome:
    """How a check went: `problem` is None where all is well; `trace` is there if the rule raised what it may not."""

    check: str
    meaning: str
    seconds: float
    problem: str | None = None
    trace: str | None = None


def run_checks(recipe: Recipe, watch: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Every check of `recipe`, each in a temporary folder of its own; `watch` hears of each as it ends."""
    outcomes = []
    for name in CHECKS:
        outcomes.append(_outcome(name, recipe))
        watch(outcomes[-1])
    return outcomes


def _outcome(name: str, recipe: Recipe) -> Outcome:
    begun, problem, trace = time.perf_counter(), None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            CHECKS[name](recipe, Path(folder))
        except (Violation, HeterodoxError) as error:
            problem = str(error)
        except (Exception, SystemExit) as error:  # a bug in the rule
            problem, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    meaning = (CHECKS[name].__doc__ or "").split("\n")[0]
    return Outcome(name, meaning, time.perf_counter() - begun, problem, trace)
