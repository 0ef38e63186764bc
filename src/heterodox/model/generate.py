"""Sampling text from a language model."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heterodox.core.protocols import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "batch time"],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Int[Tensor, " batch"]], None] | None = None,
) -> Int[Tensor, "batch longer"]:
    """Continue each prompt by `num_tokens` sampled tokens.

    Temperature 0 takes the likeliest token. `top_k` keeps the k likeliest, `top_p` the smallest set whose probability
    reaches p (Holtzman et al., 2020). Ids from `vocab_size` on, which pad a model's output, are never drawn. The model
    sees the last `model.context` tokens. `on_token` is called with each new token. Raises `ValueError` for an empty
    prompt or settings out of range.
    """
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("expected temperature ≥ 0, top_k ≥ 1 and 0 < top_p ≤ 1")
    was_training = model.training
    model.eval()
    tokens = prompt
    for _ in range(num_tokens):
        logits = model(tokens[:, -model.context :])[:, -1].float()
        if vocab_size is not None:
            logits[:, vocab_size:] = -torch.inf
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            # The largest becomes 0 first: however small the temperature, no quotient overflows upwards.
            scaled = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).float()
            probabilities = torch.softmax(_filter(scaled, top_k, top_p), dim=-1)
            chosen = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(tokens.device)
        tokens = torch.cat([tokens, chosen], dim=1)
        if on_token is not None:
            on_token(chosen[:, 0])
    model.train(was_training)
    return tokens


def _filter(
    logits: Float[Tensor, "batch vocab"], top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab"]:
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first token always stays
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    return logits
