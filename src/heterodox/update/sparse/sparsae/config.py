"""The options of Sparsae."""

from typing import Literal

from pydantic import Field

from heterodox.core import config
from heterodox.update.sparse.schedule import DecayingSchedule
from heterodox.update.sparse.sparsae.bounds import BoundsOptions
from heterodox.update.sparse.sparsae.proxy import ProxyOptions
from heterodox.update.sparse.sparsae.reset import ResetOptions

Selection = Literal["proxy", "ce_only", "random"]
Growth = Literal["uniform", "activity", "relative", "mixed"]
Scope = Literal["layer", "global", "mixed"]


class SparsaeOptions(DecayingSchedule):
    """When, how many, how far, and how they are judged."""

    name: Literal["sparsae"] = "sparsae"
    children: int = Field(4, ge=0, description="candidates in an event besides the mask that is there, λ; 0: static")
    survival: Literal["plus", "comma"] = Field(
        "comma", description="whether the parent competes, (1 + λ), or gives way to a child in every event, (1, λ)"
    )
    mutation: float = Field(0.3, gt=0, le=1, description="share of the connections that a child swaps")
    scope: Scope = Field(
        "layer", description="where: the same share of every layer, anywhere within the bounds, or the two in turn"
    )
    drop: Literal["uniform", "magnitude"] = Field(
        "magnitude", description="what a child drops: any connection, or the smallest for their layer"
    )
    grow: Growth = Field(
        "mixed",
        description="what it grows: any missing connection, or among those with the largest signal, as it is or "
        "relative to row and column; `mixed`: `activity` and `uniform` in turn",
    )
    pool: float = Field(
        2.0,
        ge=1,
        description="growth by signal, but for the first child of its kind, chooses among so many times what it needs",
    )
    signal: Literal["training", "micro_batch"] = Field(
        "training", description="that of the training step, or of a pass on a micro-batch; for growth and look-ahead"
    )
    judge: Literal["at_once", "look_ahead"] = Field(
        "look_ahead", description="score candidates as they are, or after a step that all of them take"
    )
    reach: float = Field(0.1, gt=0, description="length of that step, in steps of the inner update")
    selection: Selection = Field(
        "proxy", description="who wins: the best composite score, the lowest loss, or chance (the control)"
    )
    margin: float = Field(
        2.0,
        ge=0,
        description="standard errors by which a loss must lie, window by window, below that of the first candidate "
        "that may win, lest that one wins; 0: none",
    )
    micro_batch: int = Field(16, ge=1, description="windows of the meta split that candidates are scored on")
    proxy: ProxyOptions = ProxyOptions()  # pyrefly: ignore[missing-argument]
    reset: ResetOptions = ResetOptions()  # pyrefly: ignore[missing-argument]
    bounds: BoundsOptions = BoundsOptions()  # pyrefly: ignore[missing-argument]

    def refusals(self, recipe: config.Config) -> list[str]:
        reasons = super().refusals(recipe)
        update = recipe.update  # pyrefly: ignore[missing-attribute]
        if self.margin and self.judge == "at_once" and self.signal == "micro_batch":
            reasons.append(
                f"update.topology.margin {self.margin} compares losses window by window, and judge at_once with signal "
                "micro_batch knows their mean alone; set margin: 0"
            )
        if self.margin and self.micro_batch == 1:
            reasons.append(
                f"update.topology.margin {self.margin} is in standard errors over the windows of a micro-batch, and "
                "update.topology.micro_batch is 1; make that at least 2, or set margin: 0"
            )
        return reasons + (self.bounds.complaints(update.sparsity) if self.children else [])
