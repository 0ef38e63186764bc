"""A forward pass that keeps, for each layer, just what the layer's own weight gradient needs: no autograd graph.

Works on any module made of linear, LayerNorm and embedding layers, with operations between them. Another module that
holds parameters, and no modules, learns by its own derivative, taken at its inputs once more. What a norm or an
activation puts out is not kept but computed again, under dropout with the same mask.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.core.memory import hold

# Modules called again: the same output, random numbers included, and their derivative by autograd.


RandomState = tuple[Tensor, ...]
"""Of the global generators: the CPU's, and the device's if that is a GPU."""


@dataclass(frozen=True, eq=False)
class Call:
    """One module's part in a forward pass; `rng` is the generators' state before it, if it drew random numbers."""

    name: str
    module: nn.Module
    rng: RandomState | None = None

    def run(self, *inputs: Tensor) -> Tensor:
        """The output again."""
        if self.rng is None:
            return self.module.forward(*inputs)
        with replayed(self.rng, inputs[0].device):
            return self.module.forward(*inputs)


@dataclass(frozen=True, eq=False)
class Operation:
    """Modules in a row that consumed `inputs`: an activation, attention's mixing, a gate and the dropout behind it."""

    calls: tuple[Call, ...]
    inputs: tuple[Tensor, ...]
    output_shape: torch.Size

    @property
    def name(self) -> str:
        """That of the first module, whatever stands behind it."""
        return self.calls[0].name

    def run(self, *inputs: Tensor) -> Tensor:
        """The output again, of these inputs."""
        output = self.calls[0].run(*inputs)
        for call in self.calls[1:]:
            output = call.run(output)
        return output

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of its modules."""
        return {
            f"{call.name}.{name}": parameter
            for call in self.calls
            for name, parameter in call.module.named_parameters()
            if parameter.requires_grad
        }

    def vjp(self, delta: Tensor, *, through: bool = True) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
        """The output again, and from the error `delta` at it those at the inputs and the parameters' gradients.

        Without `through` there are no errors at the inputs. The answers are differentiable in `delta` if it requires a
        gradient.
        """
        parameters = self.parameters()
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in self.inputs] if through else self.inputs
            leaves = [*inputs, *parameters.values()] if through else list(parameters.values())
            again = delta.requires_grad
            with sdpa_kernel(SDPBackend.MATH) if again else nullcontext():  # the only kernel with a second derivative
                output = self.run(*inputs)
            found = torch.autograd.grad(output, leaves, delta.to(output.dtype), create_graph=again)
        num_errors = len(leaves) - len(parameters)
        return output.detach(), found[:num_errors], dict(zip(parameters, found[num_errors:], strict=True))


def error_through(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """The error at `module`'s input `x`, given the error `delta` at its output."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = module.forward(leaf)
        return torch.autograd.grad(output, leaf, delta.to(output.dtype))[0]


def draws(module: nn.Module) -> bool:
    """Whether `module` is about to draw random numbers."""
    rates = (getattr(module, name, None) for name in ("p", "dropout"))
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


def random_state(device: torch.device) -> RandomState:
    """What `replayed` needs to draw again what a model on `device` is about to draw."""
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


@contextmanager
def replayed(state: RandomState, device: torch.device) -> Iterator[None]:
    """Within the context, the global generators go on from `state`; afterwards from where they were."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.set_rng_state(state[0])
        if on_gpu:
            torch.cuda.set_rng_state(state[1], device)
        yield


POINTWISE: tuple[type[nn.Module], ...] = (
    nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.LeakyReLU,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A layer's input: the held tensor itself, or what `maker` makes of it."""

    held: Tensor
    maker: Callable[[Tensor], Tensor] | None = None

    def value(self) -> Tensor:
        return self.held if self.maker is None else self.maker(self.held)


@dataclass(eq=False)
class Record:
    """One layer's part in the forward pass; `consumer` is the operation that took its output as input `slot`.

    `point` names where the error for this layer enters: the layer's own output, or behind its consumer. A module that
    learns by its own derivative is the operation `own`; if errors also pass through it, it is its own consumer.
    """

    name: str
    layer: nn.Module
    source: Source
    output_shape: torch.Size
    consumer: Operation | None = None
    slot: int = 0
    own: Operation | None = None

    @property
    def point(self) -> str:
        return self.name if self.consumer is None else self.consumer.name

    @property
    def point_end(self) -> str:
        """The module whose output the error at `point` is for: the last one of the consumer, or the layer."""
        return self.name if self.consumer is None else self.consumer.calls[-1].name

    @property
    def point_width(self) -> int:
        return (self.output_shape if self.consumer is None else self.consumer.output_shape)[-1]

    @property
    def learns(self) -> bool:
        """Whether any parameter of the layer is trainable."""
        return any(parameter.requires_grad for parameter in self.layer.parameters())


class Tape:
    """The records of one forward pass, in order."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._made: dict[int, tuple[weakref.ref[Tensor], Source]] = {}
        # By a tensor's id: the records whose error enters there, and the operation behind them if there is one.
        self._outputs: dict[int, tuple[weakref.ref[Tensor], list[Record], Operation | None]] = {}
        self._states: dict[str, RandomState | None] = {}
        self._remade: list[tuple[Source, Tensor]] = []  # the latest two
        self._behind: tuple[Operation, Tensor, tuple[Tensor, ...], dict[str, Tensor]] | None = None

    def input_of(self, record: Record) -> Tensor:
        """The layer's input. The latest ones computed are kept, since neighbours share them."""
        source = record.source
        if source.maker is None:
            return source.held
        for known, made in self._remade:
            if known.held is source.held and known.maker == source.maker:
                return made
        return self._remember(source, source.value())

    def _remember(self, source: Source, made: Tensor) -> Tensor:
        self._remade = [(source, made), *self._remade[:1]]
        return made

    def gradients(self, record: Record, delta: Float[Tensor, "*lead out"]) -> Iterator[tuple[str, Tensor]]:
        """The layer's trainable parameters' gradients, in their dtype, given the error at the layer's `point`."""
        if not record.learns:
            return
        for name, gradient in self._gradients(record, delta):
            parameter = record.layer.get_parameter(name)
            if parameter.requires_grad:
                yield f"{record.name}.{name}", gradient.to(parameter.dtype)

    def _gradients(self, record: Record, delta: Tensor) -> Iterator[tuple[str, Tensor]]:
        grads: dict[str, Tensor] = {}
        if record.consumer is not None:
            errors, grads = self._through(record.consumer, delta)
            delta = errors[record.slot]
        layer = record.layer
        if record.own is not None:
            if record.own is not record.consumer:
                _, _, grads = record.own.vjp(delta, through=False)
            start = f"{record.name}."
            yield from ((name.removeprefix(start), g) for name, g in grads.items() if name.startswith(start))
        elif isinstance(layer, nn.Linear):
            rows = delta.flatten(0, -2)
            yield "weight", rows.T @ self.input_of(record).flatten(0, -2).to(rows.dtype)
            if layer.bias is not None:
                yield "bias", rows.sum(0)
        elif isinstance(layer, nn.LayerNorm):
            leading = tuple(range(delta.ndim - len(layer.normalized_shape)))
            if layer.weight is not None:
                normal = F.layer_norm(record.source.held.to(delta.dtype), layer.normalized_shape, eps=layer.eps)
                yield "weight", (delta * normal).sum(leading)
            if layer.bias is not None:
                yield "bias", delta.sum(leading)
        else:
            assert isinstance(layer, nn.Embedding)
            rows = delta.sum_to_size(record.output_shape).flatten(0, -2).to(layer.weight.dtype)
            yield "weight", torch.zeros_like(layer.weight).index_add_(0, record.source.held.flatten(), rows)

    def _through(self, operation: Operation, delta: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Errors at the operation's inputs and its parameters' gradients; the latest are kept for its other inputs."""
        if self._behind is None or self._behind[0] is not operation or self._behind[1] is not delta:
            output, errors, grads = operation.vjp(delta)
            self._behind = (operation, delta, errors, grads)
            if len(operation.inputs) == 1:
                self._remember(Source(operation.inputs[0], operation.run), output)
        return self._behind[2:]

    def _after_linear(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        known = self._made.get(id(args[0]))
        source = known[1] if known and known[0]() is args[0] else Source(hold(args[0]))
        self._keep(Record(name, layer, source, output.shape), output)

    def _after_plain(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._keep(Record(name, layer, Source(hold(args[0])), output.shape), output)
        if isinstance(layer, nn.LayerNorm):
            self._made[id(output)] = (weakref.ref(output), Source(args[0], layer.forward))

    def _before_operation(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states[name] = random_state(args[0].device) if draws(module) else None

    def _after_own(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        own = Operation((Call(name, module, self._states[name]),), tuple(hold(x) for x in args), output.shape)
        self._keep(Record(name, module, Source(args[0]), output.shape, own=own), output)

    def _after_operation(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found = [known for x in args if (known := self._outputs.get(id(x))) and known[0]() is x]
        records = [record for _, behind, _ in found for record in behind]
        before = found[0][2] if found else None
        call = Call(name, module, self._states[name])
        own = [Record(name, module, Source(args[0]), output.shape)] if any(True for _ in module.parameters()) else []
        if len(found) == len(args) == 1 and before is not None:  # in a row
            operation = Operation((*before.calls, call), before.inputs, output.shape)
        elif len(found) == len(args) and all(known[2] is None for known in found):
            operation = Operation((call,), tuple(hold(x) for x in args), output.shape)
            for slot, record in enumerate(records):
                record.slot = slot
        else:  # not straight behind layers: nothing else to learn from its derivative
            if own:
                self._after_own(name, module, args, output)
            return
        for record in [*records, *own]:
            record.own = operation if record in own or (before and record.own is before) else record.own
            record.consumer = operation
        self.records += own
        self._outputs[id(output)] = (weakref.ref(output), [*records, *own], operation)
        if len(operation.inputs) == 1:
            self._made[id(output)] = (weakref.ref(output), Source(operation.inputs[0], operation.run))

    def _keep(self, record: Record, output: Tensor) -> None:
        self.records.append(record)
        self._outputs[id(output)] = (weakref.ref(output), [record], None)


@contextmanager
def record_layers(model: nn.Module, operations: tuple[type[nn.Module], ...] = POINTWISE) -> Iterator[Tape]:
    """Within the context, write every forward call of `model`'s layers on a tape. Run it under `torch.no_grad()`.

    Errors are carried back through modules of the types in `operations` by their own derivative, also through several
    in a row.
    """
    tape = Tape()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hook = partial(tape._after_linear, name)
        elif isinstance(module, (nn.LayerNorm, nn.Embedding)):
            hook = partial(tape._after_plain, name)
        elif isinstance(module, operations) or (any(True for _ in module.parameters()) and not any(module.children())):
            hook = partial(tape._after_operation if isinstance(module, operations) else tape._after_own, name)
            handles.append(module.register_forward_pre_hook(partial(tape._before_operation, name)))
        else:
            continue
        handles.append(module.register_forward_hook(hook))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()
