"""A forward pass that keeps, for each layer, just what the layer's own weight gradient needs: no autograd graph.

Works on any module made of linear, LayerNorm and embedding layers, with operations that have no parameters between
them. What a norm or an activation puts out is not kept but computed again from its input.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.held import hold

POINTWISE: tuple[type[nn.Module], ...] = (
    nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A layer's input: the held tensor itself, or what `maker` makes of it."""

    held: Tensor
    maker: nn.Module | None = None

    def value(self) -> Tensor:
        return self.held if self.maker is None else self.maker.forward(self.held)


@dataclass(frozen=True)
class Operation:
    """A module without parameters that consumed layers' outputs: an activation, attention's mixing."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    output_shape: torch.Size

    def vjp(self, delta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output again, and the error at each input given the error at the output."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in self.inputs]
            output = self.module.forward(*leaves)
            return output.detach(), torch.autograd.grad(output, leaves, delta.to(output.dtype))


@dataclass
class Record:
    """One layer's part in the forward pass; `consumer` is the operation that took its output as input `slot`.

    `point` names where the error for this layer enters: the layer's own output, or behind its consumer.
    """

    name: str
    layer: nn.Module
    source: Source
    output_shape: torch.Size
    consumer: Operation | None = None
    slot: int = 0

    @property
    def point(self) -> str:
        return self.name if self.consumer is None else self.consumer.name

    @property
    def point_width(self) -> int:
        return (self.output_shape if self.consumer is None else self.consumer.output_shape)[-1]


class Tape:
    """The records of one forward pass, in order."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._made: dict[int, tuple[weakref.ref[Tensor], Source]] = {}
        self._outputs: dict[int, tuple[weakref.ref[Tensor], Record]] = {}
        self._remade: list[tuple[Tensor, Tensor]] = []  # held tensors and what was made of them, the latest two
        self._errors: tuple[Operation, Tensor, tuple[Tensor, ...]] | None = None

    def input_of(self, record: Record) -> Tensor:
        """The layer's input. The latest ones computed are kept, since neighbours share them."""
        source = record.source
        if source.maker is None:
            return source.held
        for held, made in self._remade:
            if held is source.held:
                return made
        return self._remember(source.held, source.value())

    def _remember(self, held: Tensor, made: Tensor) -> Tensor:
        self._remade = [(held, made), *self._remade[:1]]
        return made

    def gradients(self, record: Record, delta: Float[Tensor, "*lead out"]) -> Iterator[tuple[str, Tensor]]:
        """The layer's own parameter gradients, in their parameters' dtype, given the error at the layer's `point`."""
        for name, gradient in self._gradients(record, delta):
            yield name, gradient.to(record.layer.get_parameter(name.rpartition(".")[2]).dtype)

    def _gradients(self, record: Record, delta: Tensor) -> Iterator[tuple[str, Tensor]]:
        if record.consumer is not None:
            delta = self._behind(record.consumer, delta)[record.slot]
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
            rows = delta.sum_to_size(record.output_shape).flatten(0, -2).to(layer.weight.dtype)
            indices = record.source.held.flatten()
            yield f"{name}.weight", torch.zeros_like(layer.weight).index_add_(0, indices, rows)

    def _behind(self, operation: Operation, delta: Tensor) -> tuple[Tensor, ...]:
        if self._errors is None or self._errors[0] is not operation or self._errors[1] is not delta:
            output, errors = operation.vjp(delta)
            self._errors = (operation, delta, errors)
            if len(operation.inputs) == 1:
                self._remember(operation.inputs[0], output)
        return self._errors[2]

    def _after_linear(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        known = self._made.get(id(args[0]))
        source = known[1] if known and known[0]() is args[0] else Source(hold(args[0]))
        self._keep(Record(name, layer, source, output.shape), output)

    def _after_plain(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._keep(Record(name, layer, Source(hold(args[0])), output.shape), output)
        if isinstance(layer, nn.LayerNorm):
            self._made[id(output)] = (weakref.ref(output), Source(args[0], layer))

    def _after_operation(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        makers = [self._outputs.get(id(x)) for x in args]
        records = [known[1] for known, x in zip(makers, args, strict=True) if known and known[0]() is x]
        if len(records) < len(args):  # not straight behind layers: nothing to learn from its derivative
            return
        operation = Operation(name, module, tuple(hold(x) for x in args), output.shape)
        for slot, record in enumerate(records):
            record.consumer, record.slot = operation, slot
        if len(args) == 1:
            self._made[id(output)] = (weakref.ref(output), Source(args[0], module))

    def _keep(self, record: Record, output: Tensor) -> None:
        self.records.append(record)
        self._outputs[id(output)] = (weakref.ref(output), record)


@contextmanager
def record_layers(model: nn.Module, operations: tuple[type[nn.Module], ...] = POINTWISE) -> Iterator[Tape]:
    """Within the context, write every forward call of `model`'s layers on a tape. Run it under `torch.no_grad()`.

    Errors are carried back through modules of the types in `operations` by their own derivative.
    """
    tape = Tape()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hook = partial(tape._after_linear, name)
        elif isinstance(module, (nn.LayerNorm, nn.Embedding)):
            hook = partial(tape._after_plain, name)
        elif isinstance(module, operations):
            hook = partial(tape._after_operation, name)
        else:
            continue
        handles.append(module.register_forward_hook(hook))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()
