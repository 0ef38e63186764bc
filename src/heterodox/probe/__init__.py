"""Looking at a rule from outside: its alignment with the exact gradient, its memory."""

from heterodox.probe.alignment import alignment, exact_gradients
from heterodox.probe.memory import activation_bytes

__all__ = ["activation_bytes", "alignment", "exact_gradients"]
