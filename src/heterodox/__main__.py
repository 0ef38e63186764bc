"""`python -m heterodox`."""

from heterodox.cli import main

main()
