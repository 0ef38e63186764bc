"""What the model would do with other weights: a look that leaves no trace."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.comm import Comm
from heterodox.core.protocols import Credit, LanguageModel, Objective
from heterodox.core.state import map_tensors
from heterodox.core.types import Alignment, Batch, Cost
from heterodox.credit.backprop import differentiate, trainable
from heterodox.objective import CrossEntropy


class ModelWindow:
    """Losses and signals of `model` under `credit`, with some of its weights replaced for the time of the look.

    The parameters keep their storage: another is put in its place and taken out again, so what comes back has the same
    bits. Dropout is off, buffers and random generators are not used, and what the rule remembers is put back.
    """

    def __init__(self, model: LanguageModel, credit: Credit, comm: Comm) -> None:
        self.model = model
        self.credit = credit
        self.comm = comm
        self.cost = Cost()
        self._objective = CrossEntropy()
        self._parameters = dict(model.named_parameters())

    @torch.no_grad()
    def losses(self, batch: Batch, weights: Mapping[str, Tensor]) -> Float[Tensor, " examples"]:
        with self._with(weights):
            losses = self._objective.losses(self.model(batch.inputs), batch)
        self._charge(batch, self.model.forward_flops(*batch.inputs.shape).total)
        return self.comm.gather(losses)

    def signal(self, batch: Batch, weights: Mapping[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        untouched = map_tensors(self.credit.state(), torch.clone)
        even = torch.ones(len(batch.ids), dtype=self.model.head.weight.dtype, device=batch.inputs.device)
        with self._with(weights), torch.enable_grad():
            signal = self.credit.signal(self.model, batch, even, self._objective)
        self.credit.load_state(untouched)
        self._charge(batch, signal.cost.flops)
        self.comm.mean_([*signal.grads.values(), signal.loss])
        return signal.loss, signal.grads

    def _charge(self, batch: Batch, flops: int) -> None:
        self.cost += Cost(meta_tokens=batch.num_tokens, flops=flops)

    @contextmanager
    def _with(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = {name: self._parameters[name].data for name in weights}
        training = self.model.training
        self.model.eval()
        try:
            for name, values in weights.items():
                self._parameters[name].data = values
            with self.model.full_precision():  # masks differ by less than bfloat16 shows
                yield
        finally:
            for name, values in own.items():
                self._parameters[name].data = values
            self.model.train(training)


# How close a rule's signal comes to the exact gradient.
#
# For each parameter, between its signal and the gradient of the same objective on the same batch at the same weights:
# the cosine, the ratio of norms (signal over gradient), and the share of entries whose signs agree.


def exact_gradients(
    model: LanguageModel,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    comm: Comm,
) -> dict[str, Tensor]:
    """Autograd's gradient of the weighted loss for every trainable parameter, averaged over the ranks."""
    grads = differentiate(model, batch, weights, objective, trainable(model)).grads
    comm.mean_(list(grads.values()))
    return grads


@torch.no_grad()
def alignment(signal: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Alignment:
    """Cosine, norm ratio and sign agreement by parameter name, for those that have a signal.

    A measure that is not defined (a zero vector has no direction) is `None`.
    """
    report: Alignment = {}
    for name in signal:
        s, g = signal[name].double().flatten(), exact[name].double().flatten()
        norm_s, norm_g = float(s.norm()), float(g.norm())
        known = math.isfinite(norm_s) and math.isfinite(norm_g) and norm_g > 0
        report[name] = {
            "cosine": float(s @ g) / (norm_s * norm_g) if known and norm_s > 0 else None,
            "norm_ratio": norm_s / norm_g if known else None,
            "sign_agreement": float((s.sign() == g.sign()).double().mean()) if known and norm_s > 0 else None,
        }
    return report
