"""MCL-DSUP: learned credit. The rule is in `rule.py`."""

from heterodox.credit.meta_critic.rule import MetaCritic

__all__ = ["MetaCritic"]
