"""A recipe, a model and a batch small enough to check a rule in seconds."""

from typing import Any

import torch

from heterodox.core.rng import Streams
from heterodox.core.types import Batch
from heterodox.model import GPT
from heterodox.recipe import Recipe, check, merge

CORPUS = {"name": "grammar", "symbols": 8, "order": 1, "concentration": 0.2, "length": 20_000}
BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"corpus": CORPUS, "tokenizer": {"name": "char"}},
    "model": {"name": "gpt", "layers": 2, "heads": 2, "width": 16, "context": 16},
    "run": {
        "budget": {"steps": 30},
        "batch_size": 8,
        "eval_every": 10,
        "eval_batches": 4,
        "checkpoint_every": 10,
        "log_every": 5,
        "sampling": {"tokens": 8},
        "device": "cpu",
        "threads": 1,
    },
}


def tiny_recipe(**sections: Any) -> Recipe:
    """A GPT of two blocks on a first-order Markov chain, 30 steps; `sections` are laid over it."""
    return check(merge(BASE, sections))


def tiny_gpt(dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    """A GPT with weights ten times as large as at initialisation, so that no layer is nearly linear."""
    options = {"layers": 2, "heads": 2, "width": 8, "context": 6, "bias": True} | options
    model = GPT.Config.model_validate(options).build(11, Streams(0)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1).add_(
                0.1 * torch.randn(parameter.shape, generator=Streams(1).generator("init"), dtype=dtype)
            )
    return model


def tiny_batch(batch: int = 4, context: int = 6, vocab: int = 11, seed: int = 0) -> Batch:
    """Windows of random tokens."""
    tokens = torch.randint(vocab, (batch, context + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(batch))
