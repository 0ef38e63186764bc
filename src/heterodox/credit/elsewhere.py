"""The earlier place of `heterodox.credit.base`, kept for parts from outside until version 0.3."""

from heterodox.credit.base import Elsewhere, backprop_elsewhere, elsewhere_names, elsewhere_refusals, feedback_manifest

__all__ = ["Elsewhere", "backprop_elsewhere", "elsewhere_names", "elsewhere_refusals", "feedback_manifest"]
