"""The loss on held-out text."""

import math
from collections.abc import Iterable

import torch

from heterodox.core.comm import Comm
from heterodox.core.protocols import LanguageModel
from heterodox.core.types import Batch


@torch.no_grad()
def evaluate(model: LanguageModel, batches: Iterable[Batch], comm: Comm) -> float:
    """Mean cross-entropy in nats per token over all ranks' batches, dropout off.

    Always the plain cross-entropy, whatever objective a rule trains on, so that rules stay comparable.
    """
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(str(device))
        logits = model(batch.inputs).flatten(0, 1)
        wide = logits if logits.dtype.itemsize >= 4 else logits.float()
        loss = torch.nn.functional.cross_entropy(wide, batch.targets.flatten(), reduction="sum")
        total += torch.stack([loss.double(), torch.tensor(batch.num_tokens, device=device).double()])
    model.train(was_training)
    loss, tokens = comm.sum(total).tolist()
    return loss / tokens if tokens else math.nan


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token as bits per UTF-8 byte of the text."""
    return loss / math.log(2) / bytes_per_token
