"""Equilibrium propagation, and the two exact rules for models that relax."""
