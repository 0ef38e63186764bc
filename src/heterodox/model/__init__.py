"""The models that rules train."""

from heterodox.model.equilibrium import Equilibrium
from heterodox.model.generate import generate
from heterodox.model.gpt import GPT

__all__ = ["GPT", "Equilibrium", "generate"]
