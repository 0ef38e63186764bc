"""The base of every recipe section, under the name that parts from outside import."""

from heterodox.core.slot import Config

__all__ = ["Config"]
