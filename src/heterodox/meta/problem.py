"""A weighted loss as a function of one flat vector of weights, with first and second derivatives in pieces."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.core.protocols import LanguageModel
from heterodox.meta.steps import Flat

B = TypeVar("B")
DROPPING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
Losses = Callable[[Any, Any], Float[Tensor, " batch"]]
"""Of a model and a batch: the loss of each example, differentiable in the model's parameters."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A gradient with the graph that it came from, to be differentiated once more."""

    parameters: list[Tensor]
    weights: Float[Tensor, " batch"]
    gradients: tuple[Tensor, ...]
    losses: Float[Tensor, " batch"]

    def gradient(self) -> Flat:
        return flat(gradient.detach() for gradient in self.gradients)

    def second_order(self, direction: Flat) -> tuple[Flat, Float[Tensor, " batch"]]:
        """Hλ and ⟨∇ℓ_i, λ⟩/n for λ = `direction`; the graph is spent."""
        along = _like(direction, self.gradients)
        wanted = [(g, d) for g, d in zip(self.gradients, along, strict=True) if g.requires_grad]
        *products, slope = torch.autograd.grad(
            [g for g, _ in wanted], [*self.parameters, self.weights], [d for _, d in wanted], materialize_grads=True
        )
        return flat(products), slope


class _Losses(nn.Module):
    """The losses as a module's forward pass, so that other weights can be put in for one call."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Any) -> Float[Tensor, " batch"]:
        return self.losses(self.model, batch)


class WeightedLoss(Generic[B]):
    """mean(w · ℓ(θ)) over a batch, for the trainable parameters θ of `model`, which are moved to where they are asked.

    `micro_batch` examples go through the model at a time. With a `seed`, every step has dropout masks of its own, the
    same ones whenever that step is computed again. Attention uses the kernel that can be differentiated twice.
    Autocast is off, around the model and in it: through many steps a derivative keeps no digit of bfloat16.
    """

    def __init__(
        self, model: nn.Module, losses: Losses, *, micro_batch: int | None = None, seed: int | None = None
    ) -> None:
        self.model = model
        self.losses = losses
        self.micro_batch = micro_batch
        self.seed = seed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._whole = _Losses(model, losses)
        self._names = [name for name, parameter in self._whole.named_parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no parameter that requires a gradient")
        if len({parameter.dtype for parameter in self.parameters}) > 1:
            raise ValueError("the model's parameters are of several dtypes; a meta-gradient needs one")

    def weights(self) -> Flat:
        """The model's weights as one vector, a copy."""
        return flat(parameter.detach() for parameter in self.parameters)

    @torch.no_grad()
    def move_to(self, weights: Flat) -> None:
        """Set the model's weights."""
        pieces = weights.split([parameter.numel() for parameter in self.parameters])
        views = [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]
        torch._foreach_copy_(list(self.parameters), views)

    def gradient(self, batch: B, weights: Float[Tensor, " batch"], step: int) -> tuple[Flat, Float[Tensor, " batch"]]:
        """∂/∂θ of the weighted loss where the model is now, and the losses of the examples."""
        total, losses = None, []
        with self._at(step):
            for piece, part in self._pieces(batch, weights):
                found = self.losses(self.model, piece)
                gradient = flat(self._differentiate((found @ part) / len(weights)))
                total = gradient if total is None else total.add_(gradient)
                losses.append(found.detach())
        assert total is not None
        return total, torch.cat(losses)

    def second_order(
        self,
        batch: B,
        weights: Float[Tensor, " batch"],
        step: int,
        direction_of: Callable[[Flat], Flat],
    ) -> tuple[Flat, Float[Tensor, " batch"]]:
        """Hλ and ⟨∇ℓ_i, λ⟩/n for λ = `direction_of`(g): the curvature along λ, and the derivative by each weight.

        Both are derivatives of s = ⟨g, λ⟩ with λ held fixed: ∂s/∂θ and ∂s/∂w_i, one pass backwards through g's own.
        """
        pieces = list(self._pieces(batch, weights))
        direction = direction_of(self.gradient(batch, weights, step)[0]) if len(pieces) > 1 else None
        curvature, by_weight = None, []
        with self._at(step):
            for piece, part in pieces:
                losses = self.losses(self.model, piece)
                found = self._record(losses, self.parameters, part, len(weights))
                direction = direction_of(found.gradient()) if direction is None else direction
                product, slope = found.second_order(direction)
                curvature = product if curvature is None else curvature.add_(product)
                by_weight.append(slope)
        assert curvature is not None
        return curvature, torch.cat(by_weight)

    def record(self, at: Flat, batch: B, weights: Float[Tensor, " batch"], step: int) -> Recorded:
        """The gradient at the weights `at`, with its graph, of all examples at once. The model stays where it is."""
        leaves = [piece.detach().requires_grad_() for piece in _like(at, tuple(self.parameters))]
        named = dict(zip(self._names, leaves, strict=True))
        with self._at(step):
            losses = functional_call(self._whole, named, (batch,))
            return self._record(losses, leaves, weights, len(weights))

    def _record(self, losses: Tensor, leaves: list[Any], weights: Tensor, count: int) -> Recorded:
        leaf = weights.detach().clone().requires_grad_()  # the caller's may change before the graph is used
        loss = (losses @ leaf) / count
        return Recorded(leaves, leaf, _connected(loss, leaves, create_graph=True), losses.detach())

    def _differentiate(self, loss: Tensor) -> tuple[Tensor, ...]:
        return _connected(loss, self.parameters)

    def _pieces(self, batch: B, weights: Tensor) -> Iterator[tuple[B, Tensor]]:
        size = self.micro_batch or len(weights)
        for start in range(0, len(weights), size):
            stop = min(start + size, len(weights))
            yield (batch if stop - start == len(weights) else rows(batch, start, stop)), weights[start:stop]

    @contextmanager
    def _at(self, step: int) -> Iterator[None]:
        devices = [parameter.device for parameter in self.parameters if parameter.is_cuda][:1]
        with ExitStack() as stack:
            for context in (torch.enable_grad(), sdpa_kernel(SDPBackend.MATH)):
                stack.enter_context(context)
            stack.enter_context(torch.autocast(self.parameters[0].device.type, enabled=False))
            for module in self.model.modules():
                if isinstance(module, LanguageModel):
                    stack.enter_context(module.full_precision())
            if self.seed is None:
                yield
                return
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.seed + step)
                yield


def rows(batch: Any, start: int, stop: int) -> Any:
    """The examples from `start` to `stop`: of a tensor, or of every tensor in a tuple, list, mapping or dataclass."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, (tuple, list)):
        return type(batch)(rows(part, start, stop) for part in batch)
    if isinstance(batch, Mapping):
        return {key: rows(part, start, stop) for key, part in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = {field.name: rows(getattr(batch, field.name), start, stop) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **parts)
    raise TypeError(f"cannot take examples of a {type(batch).__name__}; give tensors, or containers of them")


def num_examples(batch: Any) -> int:
    """How many examples there are in what `rows` can slice."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        return num_examples(next(iter(batch.values())))
    if isinstance(batch, (tuple, list)):
        return num_examples(batch[0])
    return num_examples(getattr(batch, dataclasses.fields(batch)[0].name))


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in training draws masks."""
    rates = [m.p if isinstance(m, DROPPING) else getattr(m, "dropout", 0.0) for m in model.modules()]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def flat(tensors: Any) -> Flat:
    """One vector of all of them."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _connected(loss: Tensor, leaves: list[Any], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """∂loss/∂leaves, zeros for leaves without a part in it; that none has one is a mistake."""
    found = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
    assert any(gradient is not None for gradient in found), "the losses do not depend on the weights: another model's?"
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))


def _like(vector: Flat, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    pieces = vector.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
