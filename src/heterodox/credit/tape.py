"""A forward pass that keeps, for each layer, just what the layer's own weight gradient needs: no autograd graph.

Works on any module made of linear, LayerNorm, embedding and pointwise activation modules (and anything between them
that has no parameters). What a norm or an activation puts out is not kept but computed again from its input.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.held import hold

POINTWISE = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU)


@dataclass(frozen=True)
class Source:
    """A layer's input: the held tensor itself, or `maker` of it."""

    held: Tensor
    maker: nn.Module | None = None

    def value(self) -> Tensor:
        return self.held if self.maker is None else self.maker.forward(self.held)


@dataclass
class Record:
    """One layer's part in the forward pass."""

    name: str
    layer: nn.Module
    source: Source
    output_shape: torch.Size
    activation: nn.Module | None = None
    preactivation: Tensor | None = None


class Tape:
    """The records of one forward pass, in order."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._made: dict[int, tuple[weakref.ref[Tensor], Source]] = {}
        self._outputs: dict[int, tuple[weakref.ref[Tensor], Record]] = {}
        self._last: tuple[Source, Tensor] | None = None

    def input_of(self, record: Record) -> Tensor:
        """The layer's input. The latest one is kept, since neighbours share it."""
        if record.source.maker is None:
            return record.source.held
        if self._last is None or self._last[0] is not record.source:
            self._last = (record.source, record.source.value())
        return self._last[1]

    def gradients(self, record: Record, delta: Float[Tensor, "*lead out"]) -> Iterator[tuple[str, Tensor]]:
        """The layer's own parameter gradients, given the error at its output (behind its activation, if any)."""
        if record.activation is not None:
            delta = _vjp(record.activation, record.preactivation, delta)
        layer, name = record.layer, record.name
        if isinstance(layer, nn.Linear):
            rows = delta.flatten(0, -2)
            yield f"{name}.weight", rows.T @ self.input_of(record).flatten(0, -2).to(rows.dtype)
            if layer.bias is not None:
                yield f"{name}.bias", rows.sum(0)
        elif isinstance(layer, nn.LayerNorm):
            leading = tuple(range(delta.ndim - len(layer.normalized_shape)))
            if layer.weight is not None:
                normal = F.layer_norm(record.source.held.to(delta.dtype), layer.normalized_shape, eps=layer.eps)
                yield f"{name}.weight", (delta * normal).sum(leading)
            if layer.bias is not None:
                yield f"{name}.bias", delta.sum(leading)
        else:
            assert isinstance(layer, nn.Embedding)
            rows = delta.sum_to_size(record.output_shape).flatten(0, -2)
            yield (
                f"{name}.weight",
                torch.zeros_like(layer.weight).index_add_(0, record.source.held.flatten(), rows.to(layer.weight.dtype)),
            )

    def _after_linear(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        known = self._made.get(id(args[0]))
        source = known[1] if known and known[0]() is args[0] else Source(hold(args[0]))
        self._keep(Record(name, layer, source, output.shape), output)

    def _after_plain(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._keep(Record(name, layer, Source(hold(args[0])), output.shape), output)
        if isinstance(layer, nn.LayerNorm):
            self._made[id(output)] = (weakref.ref(output), Source(args[0], layer))

    def _after_activation(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        known = self._outputs.get(id(args[0]))
        if known and known[0]() is args[0]:
            known[1].activation = layer
            known[1].preactivation = hold(args[0])
            self._made[id(output)] = (weakref.ref(output), Source(args[0], layer))

    def _keep(self, record: Record, output: Tensor) -> None:
        self.records.append(record)
        self._outputs[id(output)] = (weakref.ref(output), record)


@contextmanager
def record_layers(model: nn.Module) -> Iterator[Tape]:
    """Within the context, write every forward call of `model`'s layers on a tape. Run it under `torch.no_grad()`."""
    tape = Tape()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hook = partial(tape._after_linear, name)
        elif isinstance(module, (nn.LayerNorm, nn.Embedding)):
            hook = partial(tape._after_plain, name)
        elif isinstance(module, POINTWISE):
            hook = tape._after_activation
        else:
            continue
        handles.append(module.register_forward_hook(hook))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _vjp(activation: nn.Module, at: Tensor | None, delta: Tensor) -> Tensor:
    """δ ⊙ f'(a) for a pointwise f."""
    assert at is not None
    with torch.enable_grad():
        a = at.detach().requires_grad_()
        return torch.autograd.grad(activation.forward(a), a, delta.to(a.dtype))[0]
