"""Does the search for masks carry signal? Children of one parent, scored on a micro-batch, on a large batch, and later.

Trains a sparse model with a fixed mask for a while; then, for several kinds of children, compares each child's score on
the micro-batch with its loss on a large batch, at once and after some further steps of training on the same batches.

    python bench/sparse_signal.py recipes/sparse/sparsae.yaml data.path=tinyshakespeare.txt
"""

import argparse
import copy
import itertools
import json
import statistics
from typing import Any

import torch
from torch import Tensor

from heterodox.core.comm import Solo
from heterodox.core.state import join, split
from heterodox.recipe import load_recipe
from heterodox.run.evaluation import evaluate
from heterodox.run.session import Session, open_session
from heterodox.update.sparse.sparsae.config import SparsaeOptions
from heterodox.update.sparse.sparsae.generation import Generation
from heterodox.update.sparse.topology import Change, Sight

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "aimed, look ahead": ("zero", {"grow": "activity"}),
    "small drops, look ahead": ("zero", {"grow": "uniform"}),
    "uniform, look ahead": ("zero", {"drop": "uniform", "grow": "uniform"}),
    "small drops, at once": ("zero", {"grow": "uniform", "judge": "at_once"}),
    "literal (He, uniform, at once)": (
        "he",
        {"drop": "uniform", "grow": "uniform", "judge": "at_once", "mutation": 0.005},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    for name, default in {"steps": 400, "children": 12, "further": 20, "windows": 96}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    fixed = ["run.device=cpu", "objective=cross_entropy", "update.topology.every=1000000", "update.topology.until=1"]
    length = ["run.budget.steps=1000000", "run.schedule=constant", "run.warmup_steps=50"]
    recipe = load_recipe(options.recipe, [*options.overrides, *length, *fixed])
    session = open_session(recipe, Solo(), "cpu")
    for step in range(options.steps):
        session.learner.step(session.loader.next_batch(), lr_scale=min(1.0, (step + 1) / 50))
    print(f"after {options.steps} steps: {val_loss(session, options.windows):.4f}", flush=True)
    for kind, (initial, changes) in KINDS.items():
        measure(session, kind, initial, changes, options)


def measure(session: Session, kind: str, initial: Any, changes: dict[str, Any], options: argparse.Namespace) -> None:
    """Print, as a line of JSON, what is known of one kind of children."""
    update = session.learner.update
    update.new_weights = initial
    base = session.recipe.update.topology.model_dump()
    section = base | {"children": options.children, "reset": base["reset"] | {"probability": 0.0}} | changes
    topology = update.topology
    sight = sight_of(session)
    generation = Generation(
        SparsaeOptions.model_validate(section), sight, update.window, topology._micro, topology.bounds, 0.0
    )
    before = kept(session)
    now, later = [], []
    for mask, values in zip(generation.masks, generation.values, strict=True):
        update._rewire(Change(mask, values), sight, dict(session.model.named_parameters()))
        now.append(val_loss(session, options.windows))
        for _ in range(options.further):
            session.learner.step(session.loader.next_batch())
        later.append(val_loss(session, options.windows))
        put_back(session, before)
    scores = [row["ce"] - generation.rows[0]["ce"] for row in generation.rows[1:]]
    now, later = ([loss - losses[0] for loss in losses[1:]] for losses in (now, later))
    best = min(range(len(scores)), key=scores.__getitem__)
    print(
        json.dumps(
            {
                "kind": kind,
                "swapped": section["mutation"],
                "score": [statistics.mean(scores), statistics.stdev(scores)],
                "at_once": [statistics.mean(now), statistics.stdev(now)],
                "later": [statistics.mean(later), statistics.stdev(later)],
                "rank_correlation_score_later": rank_correlation(scores, later),
                "rank_correlation_score_at_once": rank_correlation(scores, now),
                "winner_later_less_mean": later[best] - statistics.mean(later),
                "children_below_parent": sum(score < 0 for score in scores),
            }
        ),
        flush=True,
    )


def sight_of(session: Session) -> Sight:
    """What the topology would see now."""
    update, found = session.learner.update, []
    inner = update.topology.change
    update.topology.change = lambda sight: found.append(sight)
    update._event(dict(session.model.named_parameters()), 1.0)
    update.topology.change = inner
    return found[0]


def val_loss(session: Session, windows: int) -> float:
    batches = session.val_batches
    count = max(1, windows // session.recipe.run.eval_batch_size)
    return evaluate(session.model, itertools.islice(iter(batches), count), session.comm)


def kept(session: Session) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]:
    tensors, values = split(session.learner.state())
    copies = {path: tensor.clone() for path, tensor in tensors.items()}
    weights = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    return weights, copies, copy.deepcopy(values), session.loader.state()


def put_back(session: Session, before: tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]) -> None:
    weights, tensors, values, place = before
    session.model.load_state_dict(weights)
    session.learner.load_state(join({path: tensor.clone() for path, tensor in tensors.items()}, copy.deepcopy(values)))
    session.loader.load_state(place)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
