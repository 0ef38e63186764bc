"""Where the inner update would go next, without going there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.extensions import ForgetfulUpdate
from heterodox.core.state import map_tensors
from heterodox.update.sparse.masks import Masks


@dataclass(frozen=True)
class Ahead:
    """The inner update's steps from here, at this event's learning rate and clip (a factor on the signal)."""

    make_around: Callable[[], ForgetfulUpdate]
    around: ForgetfulUpdate
    parameters: Mapping[str, nn.Parameter]
    masks: Masks
    scale: float
    clip: Tensor | float = 1.0

    def newborn(self, values: Float[Tensor, " n"], signal: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Connections of these values after their first step by `signal`."""
        new = nn.Parameter(values.clone()[None])
        self.make_around().apply({"new": new}, {"new": self.clip * signal[None]}, self.scale)
        return new.data[0]

    def present(self, signal: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        """All entries after the connections that there are have taken another step by `signal`."""
        twin = self.make_around()
        twin.load_state(map_tensors(self.around.state(), torch.clone))
        copies = {name: nn.Parameter(self.parameters[name].detach().clone()) for name in self.masks.names}
        clipped = self.clip * signal * self.masks.flat
        grads = {name: grad.clone() for name, grad in self.masks.split(clipped).items()}
        twin.apply(copies, grads, self.scale)
        return self.masks.join(copies)
