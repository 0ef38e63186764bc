"""What is wanted: one file per objective."""

from heterodox.objective.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy"]
