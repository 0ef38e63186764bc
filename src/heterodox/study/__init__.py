"""Several runs: comparisons, sweeps and their processes."""
