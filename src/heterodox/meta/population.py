"""Inner models: each with its weights, moments, age and batches; as many as the options say, over all ranks."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.rng import Streams
from heterodox.core.services import Batches, LearnableSplit, Services
from heterodox.core.state import Tree
from heterodox.core.types import Batch
from heterodox.meta.options import MetaOptions
from heterodox.meta.problem import Losses, WeightedLoss, has_dropout
from heterodox.meta.steps import InnerState, InnerUpdate
from heterodox.model import GPT


class Population:
    """The inner models of this rank, and how far all of them are.

    Members are dealt out to the ranks in equal runs. They share one module, `problem.model`, which is moved to the
    weights of whoever is at work; all members take equally many steps, so one position serves all of their batches.
    """

    def __init__(self, options: MetaOptions, services: Services, losses: Losses, update: InnerUpdate) -> None:
        size = options.population
        share = size // services.comm.world_size
        self.options, self.services, self.update = options, services, update
        self.mine = range(services.comm.rank * share, (services.comm.rank + 1) * share)
        model = duplicate(services.model)
        self.problem = WeightedLoss(model, losses, micro_batch=options.micro_batch)
        self.train = {k: self._open("train", options.batch_size, k) for k in self.mine}
        self.meta = {k: self._open("meta", options.val_batch_size, k) for k in self.mine}
        self.left = [self._lifetime(k) for k in range(size)]
        self.generation = [0] * size
        self.states = {k: update.begin(self._initial_weights(k)) for k in self.mine}

    def renew(self) -> None:
        """Start anew those whose time has come; called when a round begins, never before the first."""
        for k in range(self.options.population):
            if self.options.reset == "fresh" or self.left[k] <= 0:
                self.generation[k] += 1
                self.left[k] = self.options.steps_of_life
                if k in self.states:
                    self.states[k] = self.update.begin(self._initial_weights(k))

    def aged(self, steps: int) -> None:
        """Note that every member has taken `steps` more."""
        self.left = [left - steps for left in self.left]

    def validation(self, k: int) -> list[Batch]:
        """The next batches of the meta split for member `k`."""
        return [self.meta[k].next_batch() for _ in range(self.options.val_batches)]

    def first_weights(self) -> Tensor:
        """Member 0's weights, on every rank; called by all of them."""
        weights = self.states[self.mine[0]].weights
        return self.services.comm.gather(weights[None])[0]

    def state(self) -> Tree:
        """Called by all ranks, as it collects their members."""
        together = torch.stack([torch.stack([s.weights, *s.moments]) for s in self.states.values()])
        first = self.mine[0]
        return {
            "members": self.services.comm.gather(together),
            "steps": self._gather_steps(),
            "left": list(self.left),
            "generation": list(self.generation),
            "train": self.train[first].state(),
            "meta": self.meta[first].state(),
        }

    def load_state(self, tree: Tree) -> None:
        members, first = tree.get("members"), self.states[self.mine[0]]
        wanted = (self.options.population, 1 + len(first.moments), len(first.weights))
        if members is None or tuple(members.shape) != wanted:
            found = None if members is None else tuple(members.shape)
            raise CheckpointError(
                f"the checkpoint lacks inner models of shape {wanted}, it has {found}: it belongs to another recipe"
            )
        self.left, self.generation = list(tree["left"]), list(tree["generation"])
        for k in self.mine:
            weights, *moments = members[k].to(first.weights.dtype).unbind()
            self.states[k] = InnerState(weights.clone(), tuple(m.clone() for m in moments), tree["steps"][k])
            self.train[k].load_state(tree["train"])
            self.meta[k].load_state(tree["meta"])

    def _gather_steps(self) -> list[int]:
        device = self.states[self.mine[0]].weights.device
        steps = torch.tensor([state.step for state in self.states.values()], device=device)
        return self.services.comm.gather(steps).tolist()

    def _open(self, split: LearnableSplit, batch_size: int, k: int) -> Batches:
        return open_batches(self.services, split, batch_size, k)

    def _lifetime(self, k: int) -> int:
        """The first lives end one after the other, so that later ones do, too."""
        return max(1, self.options.steps_of_life * (k + 1) // self.options.population)

    def seed_of(self, k: int) -> int | None:
        """Of member `k`'s dropout masks in its present life; None for a model without dropout."""
        if not has_dropout(self.problem.model):
            return None
        seed = self.services.streams.derive("dropout", "inner", k, self.generation[k])
        return seed >> 8  # room for the number of a step

    def _initial_weights(self, k: int) -> Tensor:
        """The run's own for the first model of all, others from a stream of their own."""
        if not k and not self.generation[k]:
            return WeightedLoss(self.services.model, self.problem.losses).weights()
        model = self.problem.model
        assert isinstance(model, GPT)
        model.initialise(Streams(self.services.streams.derive("rule", "inner", k, self.generation[k])))
        return self.problem.weights()


def check_population(options: MetaOptions, services: Services, section: str) -> None:
    """Raises `RecipeError` where ranks cannot share the inner models equally, or a round needs more than `meta` has.

    `section` is where the recipe has these options.
    """
    size, ranks = options.population, services.comm.world_size
    if size % ranks:
        raise RecipeError(f"{section}.population is {size} inner models, which {ranks} ranks cannot share equally")
    asked = options.val_batches * options.val_batch_size
    there = open_batches(services, "meta", options.val_batch_size, 0).examples_per_epoch
    if there < asked:
        raise RecipeError(
            f"the meta split has {there} examples, but {section}.val_batches {options.val_batches} of {section}."
            f"val_batch_size {options.val_batch_size} ask for {asked} in a round; give it a larger share in "
            "data.splits, or ask for fewer"
        )


def open_batches(services: Services, split: LearnableSplit, batch_size: int, k: int) -> Batches:
    """Member `k`'s own, all of each batch whatever the rank."""
    return services.supply(split, batch_size, f"inner-{k}", whole=True)


def duplicate(model: nn.Module) -> nn.Module:
    """A copy with weights and buffers of its own; of fake tensors, too, which `copy.deepcopy` alone cannot copy.

    Methods that the model has replaced by its own, such as compiled ones, are the class's again in the copy: those are
    bound to the original, whose weights they would use. The copy computes in its weights' precision, without autocast.
    """
    given = [*model.parameters(), *model.buffers()]
    copies: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in given}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(copies[id(parameter)], requires_grad=parameter.requires_grad)
    copied = copy.deepcopy(model, copies)
    for module in copied.modules():
        for name in [name for name in vars(module) if inspect.isfunction(getattr(type(module), name, None))]:
            delattr(module, name)
    if getattr(copied, "autocast_dtype", None) is not None:
        vars(copied)["autocast_dtype"] = None  # a derivative through many steps has no digit left in bfloat16
    return copied
