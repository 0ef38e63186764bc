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

import math
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.comm import Comm, Solo
from heterodox.core.errors import RecipeError
from heterodox.core.protocols import ForgetfulUpdate, LanguageModel, Window
from heterodox.core.rng import Streams
from heterodox.core.services import Connected, Services
from heterodox.core.state import Tree, restore
from heterodox.core.types import Cost, UpdateReport
from heterodox.update.adamw import AdamW
from heterodox.update.sgd import SGD
from heterodox.update.sparse import methods as topologies
from heterodox.update.sparse.masks import Distribution, Masks
from heterodox.update.sparse.methods import RigL
from heterodox.update.sparse.topology import Ahead, Change, DecayingSchedule, Sight, Topology

# What the log is told of masks.


def agree(comm: Comm, masks: Masks) -> None:
    """Assert that all ranks have the same masks."""
    if comm.world_size == 1:
        return
    sums = comm.gather(torch.tensor([masks.checksum()], dtype=torch.int64, device=masks.flat.device)).tolist()
    assert len(set(sums)) == 1, f"the ranks' masks differ: checksums {sums}"


def mask_row(update: "Sparse", before: Tensor | None) -> dict[str, Any]:
    """The masks as they are, and how they differ from those `before`."""
    masks, flat = update.masks, update.masks.flat
    dead = masks.dead()
    layers = {
        name: {"active": active, "size": size, "dead_outputs": dead[name][0], "dead_inputs": dead[name][1]}
        for name, active, size in zip(masks.names, masks.counts(), masks.sizes, strict=True)
    }
    kept = int((flat & before).sum()) if before is not None else update.num_active
    previous = int(before.sum()) if before is not None else update.num_active
    return {
        "kind": "mask",
        "event": update.num_events,
        "active": update.num_active,
        "size": masks.size,
        "grown": update.num_active - kept,
        "dropped": previous - kept,
        "overlap": kept / max(previous, 1),
        "explored": int(update.ever.sum()) / masks.size,
        "checksum": masks.checksum(),
        "search_seconds": update.search_seconds,
        "layers": layers,
    }


def now(like: Tensor) -> float:
    """Seconds on a clock, when the device that holds `like` has done what it was asked."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


# Which matrices are sparse.


def choose_layers(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The model's matrices whose names match a shell-style pattern; by default all but embeddings and head.

    Raises `RecipeError` for a pattern that matches none.
    """
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    if patterns is None:
        dense = model.embedding_names | model.readout_names if isinstance(model, LanguageModel) else frozenset()
        return {name: parameter for name, parameter in matrices.items() if name not in dense}
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in matrices if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.weight")}
        if not found:
            raise RecipeError(
                f"update.layers: {pattern!r} matches none of the model's {len(matrices)} matrices, which are called "
                f"{', '.join(list(matrices)[:3])}, …"
            )
        chosen |= found
    return {name: parameter for name, parameter in matrices.items() if name in chosen}


# The first values of new connections, and the steps in which they learn faster.


Initial = Literal["zero", "small", "he"]
SMALL = 0.1  # of He's standard deviation
TRUNCATED = 0.8796256610342398
"""The standard deviation of a normal distribution that is cut off at two of its own."""


class BurnIn(config.Config):
    """A higher learning rate for exactly the connections that are new, for their first steps."""

    steps: int = Field(5, ge=0, description="steps that new connections burn in; 0: none")
    peak: float = Field(1.5, ge=1, description="factor on their learning rate in the last of these; 1 in the first")

    def factor(self, age: int) -> float:
        """The factor in a connection's step number `age`, from 1."""
        return self.peak if self.steps == 1 else 1 + (self.peak - 1) * (age - 1) / (self.steps - 1)


def first_values(
    entries: Int[Tensor, " n"], masks: Masks, counts: list[int], initial: Initial, generator: torch.Generator
) -> Float[Tensor, " n"]:
    """Values for the connections at these flat positions, where each layer has `counts` active ones.

    `he` is a normal distribution, cut off at two standard deviations and widened so that what is left has a standard
    deviation of √(2 / (fan_in · density)); `small` is a tenth of it. Reference: He, Zhang, Ren and Sun, "Delving deep
    into rectifiers", ICCV 2015.
    """
    if initial == "zero":
        return torch.zeros(len(entries), device=entries.device)
    stds = [
        math.sqrt(2 * numel / (shape[1] * max(count, 1)))
        for shape, numel, count in zip(masks.shapes.values(), masks.sizes, counts, strict=True)
    ]
    drawn = torch.empty(len(entries))
    torch.nn.init.trunc_normal_(drawn, a=-2.0, b=2.0, generator=generator).div_(TRUNCATED)
    scale = torch.tensor(stds, device=entries.device)[masks.layers(entries)]
    return drawn.to(entries.device) * scale * (SMALL if initial == "small" else 1.0)


class Nursery:
    """The connections that are burning in: their positions by matrix, and how many steps they have taken."""

    def __init__(self, burn_in: BurnIn) -> None:
        self.burn_in = burn_in
        self.entries: dict[str, Int[Tensor, " n"]] = {}
        self.age = 0

    def fill(self, masks: Masks, grown: Int[Tensor, " n"]) -> None:
        """Take in the connections at these flat positions, in place of all before."""
        self.entries, self.age = {}, 0
        if not self.burn_in.steps:
            return
        layers = masks.layers(grown)
        for number, (name, start) in enumerate(zip(masks.names, masks.starts, strict=True)):
            if len(inside := grown[layers == number] - start):
                self.entries[name] = inside

    def before(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values of the young connections of these parameters, before they take a step."""
        return {
            name: parameters[name].view(-1)[entries] for name, entries in self.entries.items() if name in parameters
        }

    def after(self, parameters: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        """Lengthen the step that they have taken by the factor of their age.

        That is what a higher learning rate does wherever a step is proportional to it, as SGD's and AdamW's are.
        """
        if not self.entries:
            return
        self.age += 1
        factor = self.burn_in.factor(self.age)
        if factor != 1:
            for name, old in before.items():
                flat, entries = parameters[name].view(-1), self.entries[name]
                flat[entries] = old + factor * (flat[entries] - old)
        if self.age >= self.burn_in.steps:
            self.entries, self.age = {}, 0

    def state(self) -> Tree:
        return {"entries": self.entries, "age": self.age}

    def load_state(self, tree: Tree) -> None:
        self.entries, self.age = dict(tree["entries"]), tree["age"]


# The options of sparse training.


AroundConfig = Annotated[AdamW.Config | SGD.Config, Field(discriminator="name")]


class SparseOptions(config.Config):
    """`lr` in this section is short for `around.lr`."""

    name: Literal["sparse"] = "sparse"
    around: AroundConfig = Field(
        AdamW.Config(),  # pyrefly: ignore[missing-argument]
        description="the update within the masks; `update.lr` is short for `update.around.lr`",
    )
    topology: topologies.TopologyConfig = Field(
        RigL.Config(),  # pyrefly: ignore[missing-argument]
        description="how the masks change",
    )
    sparsity: float = Field(0.8, ge=0, lt=1, description="share of the masked matrices' weights that are zero")
    distribution: Distribution = Field("erk", description="of the connections over the layers")
    layers: list[str] | None = Field(
        None, min_length=1, description="patterns of matrices that are sparse; default: all but embeddings and head"
    )
    new_weights: Initial = Field("zero", description="first values of new connections")
    burn_in: BurnIn = BurnIn()  # pyrefly: ignore[missing-argument]

    @property
    def lr(self) -> float:
        """The inner update's learning rate."""
        return self.around.lr

    @model_validator(mode="before")
    @classmethod
    def _lr_is_the_inner_updates(cls, data: Any) -> Any:
        if not (isinstance(data, Mapping) and "lr" in data):
            return data
        around = _named(data.get("around", {}), "adamw")
        if around.get("lr", data["lr"]) != data["lr"]:
            raise ValueError(f"lr is {data['lr']}, but around.lr, which it is short for, is {around['lr']}; give one")
        return {key: value for key, value in data.items() if key != "lr"} | {"around": around | {"lr": data["lr"]}}

    @field_validator("around", "topology", mode="before")
    @classmethod
    def _with_name(cls, value: object, info: Any) -> object:
        """`topology: x` is short for `topology: {name: x}`; without a name it is the default's."""
        if isinstance(value, str | Mapping):
            return _named(value, cls.model_fields[info.field_name].default.name)
        return value

    def refusals(self, recipe: config.Config) -> list[str]:
        reasons = self.topology.refusals(recipe)
        credit = recipe.credit.name  # pyrefly: ignore[missing-attribute]
        if credit == "head_only" and self.layers is None:
            reasons.append(
                "update sparse would mask the blocks, which credit head_only leaves as they are; "
                "name other matrices in update.layers, or take another rule"
            )
        topology = self.topology
        if isinstance(topology, DecayingSchedule) and self.burn_in.steps > topology.every:
            reasons.append(
                f"update.burn_in.steps is {self.burn_in.steps}, expected at most update.topology.every, "
                f"{topology.every}: new connections must be through before the next ones come"
            )
        return reasons


def _named(value: Any, default: str) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else {"name": default, **value}


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
