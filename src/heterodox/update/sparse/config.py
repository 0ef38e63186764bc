"""The options of sparse training."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from heterodox.core import config
from heterodox.update.adamw import AdamW
from heterodox.update.sgd import SGD
from heterodox.update.sparse import topologies
from heterodox.update.sparse.distribution import Distribution
from heterodox.update.sparse.newborn import BurnIn, Initial
from heterodox.update.sparse.rigl import RigL
from heterodox.update.sparse.schedule import DecayingSchedule

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
