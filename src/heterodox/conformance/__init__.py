"""What every learning rule must do, as checks that anybody can run: `heterodox check`, or one by one from pytest."""

from heterodox.conformance.checks import CHECKS
from heterodox.conformance.suite import Outcome, run_checks
from heterodox.conformance.tiny import tiny_batch, tiny_gpt, tiny_recipe
from heterodox.conformance.violation import Violation, require

__all__ = ["CHECKS", "Outcome", "Violation", "require", "run_checks", "tiny_batch", "tiny_gpt", "tiny_recipe"]
