"""The alignment of a trained run's rule with the exact gradient."""

from collections.abc import Iterable
from typing import Any

import torch

from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError
from heterodox.core.files import PathLike
from heterodox.core.rng import Streams
from heterodox.core.state import restoring
from heterodox.core.types import Alignment
from heterodox.learner import Gradient
from heterodox.probe import alignment, exact_gradients
from heterodox.run.load import load_run
from heterodox.run.session import build_learner, supply_of


def probe_run(path: PathLike, checkpoint: str | None = None, num_batches: int = 1) -> list[dict[str, Any]]:
    """Cosine, norm ratio and sign agreement of the run's rule with the exact gradient, by parameter.

    Means over the next `num_batches` training batches; None where a measure is undefined on each of them.
    Raises `CheckpointError` if the corpus has changed since.
    """
    run = load_run(path, checkpoint)
    dataset = run.recipe.data.build()
    if dataset.corpus_sha256 != run.corpus_sha256:
        raise CheckpointError(f"{path} was trained on another corpus than the one that its recipe names now")
    streams, comm = Streams(run.recipe.seed), Solo()
    supply = supply_of(run.recipe, dataset, streams, comm)
    learner = build_learner(run.recipe, run.model, comm, supply, dataset.tokenizer.fingerprint)
    if not isinstance(learner, Gradient):
        raise CheckpointError(f"{path} is a run of the learner {run.recipe.learner.name}: it has no signal to compare")
    with restoring(run.folder.path):
        learner.load_state(run.learner_state)
    run.model.train()
    loader = supply("train", run.recipe.rating.drawn(run.recipe.run.batch_size))
    with restoring(run.folder.path):
        loader.load_state(run.loader_state)
    reports: list[Alignment] = []
    for index in range(num_batches):
        batch = loader.next_batch()
        batch, weights = learner.rate(batch)
        seed = streams.derive("dropout", run.step + 1 + index, 0)  # that of the step which would take this batch
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            signal = learner.credit.signal(run.model, batch, weights, learner.objective)
            torch.manual_seed(seed)
            exact = exact_gradients(run.model, batch, weights, learner.objective, comm)
        reports.append(alignment(signal.grads, exact))
    return [
        {"parameter": name} | {key: _mean(report[name][key] for report in reports) for key in measures}
        for name, measures in reports[0].items()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
