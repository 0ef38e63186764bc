"""What every learning rule must do, as checks that anybody can run: `heterodox check`, or one by one from pytest."""

from heterodox.conformance.suite import CHECKS, Outcome, Violation, require, run_checks
from heterodox.conformance.tiny import tiny_batch, tiny_gpt, tiny_recipe

__all__ = ["CHECKS", "Outcome", "Violation", "require", "run_checks", "tiny_batch", "tiny_gpt", "tiny_recipe"]
