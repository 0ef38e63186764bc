"""What is wanted: one file per objective."""

from heterodox.objective.cross_entropy import CrossEntropy
from heterodox.objective.self_distillation import SelfDistillation

__all__ = ["CrossEntropy", "SelfDistillation"]
