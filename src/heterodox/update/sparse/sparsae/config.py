"""The options of Sparsae."""

from typing import Literal

from pydantic import Field

from heterodox.core import config
from heterodox.update.sparse.schedule import Schedule
from heterodox.update.sparse.sparsae.bounds import BoundsOptions
from heterodox.update.sparse.sparsae.proxy import ProxyOptions
from heterodox.update.sparse.sparsae.reset import ResetOptions

Selection = Literal["proxy", "ce_only", "random"]


class SparsaeOptions(Schedule):
    """When, how many, how far, and how they are judged."""

    name: Literal["sparsae"] = "sparsae"
    children: int = Field(4, ge=0, description="candidates in an event besides the mask that is there, λ; 0: static")
    mutation: float = Field(0.01, gt=0, le=1, description="share of the connections that a child swaps")
    drop: Literal["uniform", "magnitude"] = Field(
        "magnitude", description="what a child drops: any connection, or one of the smallest for its layer"
    )
    grow: Literal["uniform", "activity"] = Field(
        "uniform", description="what it grows: any missing connection, or one of those with the largest signal"
    )
    pool: float = Field(2.0, ge=1, description="`magnitude` and `activity` choose among so many times what they need")
    judge: Literal["at_once", "look_ahead"] = Field(
        "look_ahead", description="score a child as it is, or after a first step of its new connections"
    )
    reach: float = Field(1.0, gt=0, description="length of that step, in steps of the inner update")
    selection: Selection = Field(
        "proxy", description="who wins: the best composite score, the lowest loss, or chance (the control)"
    )
    micro_batch: int = Field(16, ge=1, description="windows of the meta split that candidates are scored on")
    proxy: ProxyOptions = ProxyOptions()  # pyrefly: ignore[missing-argument]
    reset: ResetOptions = ResetOptions()  # pyrefly: ignore[missing-argument]
    bounds: BoundsOptions = BoundsOptions()  # pyrefly: ignore[missing-argument]

    def refusals(self, recipe: config.Config) -> list[str]:
        reasons = super().refusals(recipe)
        update = recipe.update  # pyrefly: ignore[missing-attribute]
        return reasons + self.bounds.complaints(update.sparsity)
