"""Modules called again: the same output, random numbers included, and their derivative by autograd."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
