"""Sparse training: masks around another update, from static ones to those that learn where to be.

    w ← M ⊙ w,   signal ← M ⊙ signal before the clip,   M changes every so many steps as the topology says

A masked weight, its signal and everything that the inner update remembers of it are exactly 0, and weight decay cannot
revive it. A new connection starts at zero, small, or as He would have it; the inner update treats it as one that has no
past (Adam corrects the bias of its moments by the connection's own age), and for its first steps, and nothing else, the
learning rate is higher (`burn_in`). Dropped weights are forgotten. The matrices of the blocks are sparse; embeddings,
norms, biases and head are dense unless `layers` names them. A rule's own parameters (Kolen–Pollack's feedback) stay
dense, but move by the masked signal.

Kernels are dense: a mask saves no time here. `flops` counts what is carried out; `sparse_flops` what would be left if
masked weights cost nothing. Reference for the family: Evci et al., "Rigging the lottery", ICML 2020.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heterodox.core.comm import Comm, Solo
from heterodox.core.extensions import ForgetfulUpdate, Window
from heterodox.core.rng import Streams
from heterodox.core.services import Connected, Services
from heterodox.core.state import Tree, restore
from heterodox.core.types import Cost, UpdateReport
from heterodox.update.sparse.ahead import Ahead
from heterodox.update.sparse.config import SparseOptions
from heterodox.update.sparse.distribution import Distribution
from heterodox.update.sparse.layers import choose_layers
from heterodox.update.sparse.masks import Masks
from heterodox.update.sparse.newborn import BurnIn, Initial, Nursery, first_values
from heterodox.update.sparse.record import agree, mask_row, now
from heterodox.update.sparse.topology import Change, Sight, Topology


class Sparse:
    """An update within masks that a topology draws and changes."""

    class Config(SparseOptions):
        def in_float32(self) -> list[str]:
            return self.topology.in_float32()

        def build(self) -> "Sparse":
            return Sparse(
                self.around.build,
                self.topology.build(),
                sparsity=self.sparsity,
                distribution=self.distribution,
                layers=self.layers,
                new_weights=self.new_weights,
                burn_in=self.burn_in,
            )

    def __init__(
        self,
        make_around: Callable[[], ForgetfulUpdate],
        topology: Topology,
        *,
        sparsity: float = 0.8,
        distribution: Distribution = "erk",
        layers: list[str] | None = None,
        new_weights: Initial = "zero",
        burn_in: BurnIn | None = None,
    ) -> None:
        self.make_around = make_around
        self.around = make_around()
        self.topology = topology
        self.sparsity = sparsity
        self.distribution: Distribution = distribution
        self.layers = layers
        self.new_weights: Initial = new_weights
        self.nursery = Nursery(burn_in or BurnIn())  # pyrefly: ignore[missing-argument]
        self.window: Window | None = None
        self.streams = Streams(0)
        self.comm: Comm = Solo()
        self.run_steps: int | None = None
        self.step = self.num_events = 0
        self.search_seconds = 0.0
        self.still = False
        self._signal: Tensor | None = None
        self._clip: Tensor | float = 1.0
        self._selected = False
        self._begun: list[dict[str, Any]] = []
        self._report = UpdateReport()

    @property
    def lr(self) -> float:
        """The inner update's."""
        return self.around.lr

    def connect(self, services: Services) -> None:
        """Draw the masks of the model's layers. Raises `RecipeError` where they cannot be as the recipe wants."""
        self.streams, self.run_steps = services.streams, services.steps
        self.comm = services.comm
        if isinstance(self.around, Connected):
            self.around.connect(services)
        chosen = choose_layers(services.model, self.layers)
        device = next(iter(chosen.values())).device
        self.masks = Masks({name: parameter.shape for name, parameter in chosen.items()}, device)
        self.topology.connect(services, self.masks)
        counts = self.topology.start(self.masks, self.sparsity, self.distribution)
        self.masks.draw(counts, services.streams)
        self.ever = self.masks.flat.clone()
        self._count(sum(counts), chosen)

    def _count(self, active: int, parameters: Mapping[str, Tensor]) -> None:
        """Note how many connections there are, and keep the masks as factors, one for each matrix."""
        self.num_active = active
        like = {name: parameters[name].dtype for name in self.masks.names}
        self._factors = {name: view.to(like[name]) for name, view in self.masks.views.items()}

    def watch(self, window: Window) -> None:
        self.window = window

    @torch.no_grad()
    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, factor in self._factors.items():
            parameters[name].mul_(factor)
        self._begun = [mask_row(self, None)]

    @torch.no_grad()
    def select(self, grads: Mapping[str, Tensor]) -> None:
        names = [name for name in self._factors if name in grads]
        self._signal, self._clip = None, 1.0
        if self.topology.wants_signal and self._due(self.step + 1):
            self._signal = self.masks.join({name: grads[name] for name in names})
        if names:
            torch._foreach_mul_([grads[name] for name in names], [self._factors[name] for name in names])
        self._selected = True

    def clipped(self, factor: Tensor) -> None:
        self._clip = factor

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor], scale: float = 1.0) -> None:
        if not self._selected:  # used without a learner
            self.select(grads)
        self._selected = False
        self._report, self._begun = UpdateReport(events=self._begun), []
        young = {name: parameters[name].data for name in self.nursery.entries if name in grads}
        before = self.nursery.before(young)
        self.around.apply(parameters, grads, scale)
        self.nursery.after(young, before)
        self.step += 1
        if self._due(self.step) and not self.still:
            self._event(parameters, scale)
        self._report.metrics = self._metrics()

    def _due(self, step: int) -> bool:
        schedule = self.topology.schedule
        return schedule is not None and self.run_steps is not None and schedule.due(step, self.run_steps)

    @torch.no_grad()
    def _event(self, parameters: Mapping[str, nn.Parameter], scale: float) -> None:
        """Let the topology change the mask, but not that of a run that has diverged, which the next loss will show."""
        began = now(self.masks.flat)
        masks = self.masks
        weights = masks.join({name: parameters[name] for name in masks.names})
        sight = Sight(
            step=self.step,
            steps=self.run_steps or self.step,
            masks=masks,
            weights=weights,
            signal=self._signal,
            draw=lambda grown, name: self._draw(grown, name).to(weights),
            ahead=Ahead(self.make_around, self.around, parameters, masks, scale, self._clip),
            window=self.window,
            streams=self.streams,
        )
        if not sight.finite:
            return
        change = self.topology.change(sight)
        before = masks.flat.clone()
        if change is not None:
            self._rewire(change, sight, parameters)
        self.num_events += 1
        if self.window is not None:
            self._report.cost, self.window.cost = self.window.cost, Cost()
        agree(self.comm, masks)
        seconds = now(masks.flat) - began
        self.search_seconds += seconds
        self._report.events += [
            mask_row(self, before) | (change.told if change else {}) | {"event_seconds": seconds},
            *(change.events if change else []),
        ]

    @torch.no_grad()
    def _rewire(self, change: Change, sight: Sight, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take over a new mask: what goes becomes zero and is forgotten, what comes starts its life."""
        masks = self.masks
        turned = change.flat ^ masks.flat
        grown = (change.flat & ~masks.flat).nonzero().squeeze(1)
        fresh = torch.where(change.flat, sight.weights, 0)
        fresh[grown] = sight.draw(grown, "first") if change.values is None else change.values
        masks.flat.copy_(change.flat)
        for name, values in masks.split(fresh).items():
            parameters[name].copy_(values)
        for name, entries in masks.split(turned).items():
            if entries.any():
                self.around.forget(name, entries)
        self.ever |= masks.flat
        self.nursery.fill(masks, grown)
        self._count(sum(masks.counts()), parameters)

    def _draw(self, grown: Tensor, name: str) -> Tensor:
        generator = self.streams.generator("rule", "first values", self.step, name)
        return first_values(grown, self.masks, self.masks.counts(), self.new_weights, generator)

    @torch.no_grad()
    def rehearse(self) -> int:
        if self.topology.schedule is not None:
            for name, view in self.masks.views.items():
                self.around.forget(name, torch.zeros_like(view))
        return sum(factor.nbytes for factor in self._factors.values())

    def changes(self, step: int) -> bool:
        return self._due(step + 1)

    @property
    def passes(self) -> Sequence[tuple[int, bool]]:
        return self.topology.passes

    def report(self) -> UpdateReport:
        return self._report

    def _metrics(self) -> dict[str, Tensor]:
        values = {"density": self.num_active / self.masks.size, "search_seconds": self.search_seconds}
        return {name: torch.tensor(value) for name, value in (values | self.topology.metrics()).items()}

    @property
    def structured(self) -> Sequence[str]:
        return self.masks.names

    @property
    def num_masked(self) -> int:
        return self.masks.size - self.num_active

    @property
    def saw_dense(self) -> bool:
        return self._signal is not None

    def state(self) -> Tree:
        values: Tree = {"step": self.step, "events": self.num_events, "active": self.num_active}
        values["search_seconds"] = self.search_seconds
        tensors = {"masks": self.masks.views, "ever": self.masks.split(self.ever), "newborn": self.nursery.state()}
        return values | tensors | {"around": self.around.state(), "topology": self.topology.state()}

    def load_state(self, tree: Tree) -> None:
        self.masks.load(tree.get("masks", {}), tree["active"])
        restore(self.masks.split(self.ever), tree.get("ever", {}), "history of the mask of")
        self._count(tree["active"], self._factors)
        self.step, self.num_events = tree["step"], tree["events"]
        self.search_seconds = tree["search_seconds"]
        self._begun = []
        self.nursery.load_state(tree["newborn"])
        self.around.load_state(tree["around"])
        self.topology.load_state(tree["topology"])
