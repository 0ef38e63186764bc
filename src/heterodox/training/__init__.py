"""Training a run: the loop, its checkpoints, evaluations and metrics. It knows neither rules nor recipes."""
