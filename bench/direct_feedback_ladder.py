"""Why `direct_feedback` has a route through the residual stream: from the letter of the rule to it, step by step.

    python bench/direct_feedback_ladder.py data.path=tinyshakespeare.txt run.budget.steps=400

Trains recipes/shakespeare/direct_feedback.yaml with one more change each time and prints the validation loss, beside
training the head alone. Other arguments are recipe overrides.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from heterodox.app.recipe import load_recipe
from heterodox.app.session import Session, open_session
from heterodox.core.comm import Solo
from heterodox.credit import DirectFeedback, HeadOnly
from heterodox.credit.feedback import draw_feedback
from heterodox.credit.tape import Record, Tape, error_through
from heterodox.training.evaluation import evaluate
from heterodox.training.loop import Progress, lr_scale

RECIPE = Path(__file__).parents[1] / "recipes" / "shakespeare" / "direct_feedback.yaml"
RUNGS = ("head_only", "own", "attention", "shared", "norm", "stream")


class Rung(DirectFeedback):
    """Every layer's matrix comes straight from the logits; attention passes errors by its own derivative.

    `shared`: all layers that write to the residual stream have one matrix. `norm`: theirs passes the final norm's
    derivative too.
    """

    def __init__(self, session: Session, shared: bool, norm: bool) -> None:
        model, streams = session.model, session.streams
        vocab, width = model.head.out_features, model.head.in_features
        widths = {
            point: m.shape[1] for point, m in DirectFeedback.Config(route="own").build(model, streams).feedback.items()
        }
        widths |= {f"blocks.{i}.attn.mix": width for i in range(session.recipe.model.layers)}
        drawn = {p: draw_feedback("gaussian", vocab, w, streams.generator("rule", p)) for p, w in widths.items()}
        super().__init__(drawn, route="stream")
        self.shared, self.norm = shared, norm

    def _errors(self, model, tape: Tape, error: Tensor) -> Callable[[Record], Tensor | None]:
        final = next(record for record in tape.records if record.layer is model.ln_f)

        def at(record: Record) -> Tensor | None:
            if record.layer is model.head:
                return error
            writes = record.name in model.stream_writers
            delta = error @ self.feedback["tok_emb" if writes and self.shared else record.point]
            if writes and self.norm:
                delta = error_through(model.ln_f, final.source.held, delta)
            return delta

        return at


def validation_loss(rung: str, overrides: list[str]) -> float:
    """Train on one rung of the ladder; nats per token."""
    session = open_session(load_recipe(RECIPE, overrides), Solo(), "cpu")
    if rung == "head_only":
        session.learner.credit = HeadOnly()
    elif rung in ("own", "stream"):
        session.learner.credit = DirectFeedback.Config(route=rung).build(session.model, session.streams)
    else:
        session.learner.credit = Rung(session, shared=rung != "attention", norm=rung == "norm")
    progress, run = Progress(), session.recipe.run
    while progress.spent(run.budget) < 1:
        report = session.learner.step(session.loader.next_batch(), lr_scale=lr_scale(run, progress))
        progress.advance(report.cost, 1)
    return evaluate(session.model, session.val_batches, session.comm)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for rung in RUNGS:
        print(f"{rung:10} {validation_loss(rung, sys.argv[1:]):.3f}", flush=True)
