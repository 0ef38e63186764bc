"""What critics speak for: stages of the model (the embeddings, then each block), their parameters and their slots.

A slot is a place where a critic puts its numbers. For `outer` it is a point at which an error enters (see `tape.py`),
as wide as what comes out there; for the other structures it is a parameter.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from heterodox.credit.tape import Record, record_layers
from heterodox.model import GPT

EMBEDDINGS = -1
"""The stage below the first block."""


@dataclass
class Stage:
    """One stage: the shapes of the parameters that learn in it, by name, and the widths of its slots.

    `on_stream` are the slots whose layers write to the residual stream.
    """

    index: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    on_stream: set[str] = field(default_factory=set)

    @property
    def key(self) -> str:
        """How it is called in metrics and states."""
        return "embeddings" if self.index == EMBEDDINGS else f"block_{self.index}"


def stage_of(name: str) -> int:
    """The stage that a layer or parameter of this name belongs to."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else EMBEDDINGS


def critic_of(slot: str, *, shared: bool) -> str:
    """The critic that fills a slot: its stage's, or, if shared, that of all attentions or of all MLPs."""
    if stage_of(slot) == EMBEDDINGS:
        return "embeddings"
    if not shared:
        return f"block_{stage_of(slot)}"
    return "attention" if slot.split(".")[2].startswith(("ln1", "attn")) else "mlp"


def chosen(model: GPT, matrices: Iterable[str] | None, embeddings: bool) -> Callable[[Record], bool]:
    """Whether a layer of the tape learns here: all of a block's, or those whose names end as in `matrices`."""
    endings = None if matrices is None else {f".{ending}" for ending in matrices}

    def learns(record: Record) -> bool:
        if not record.learns:
            return False
        if f"{record.name}.weight" in model.embedding_names:
            return embeddings
        return record.name.startswith("blocks.") and (endings is None or any(map(record.name.endswith, endings)))

    return learns


@torch.no_grad()
def stages_of(
    model: GPT,
    operations: tuple[type[nn.Module], ...],
    learns: Callable[[Record], bool],
    num_outputs: Callable[[tuple[int, ...]], int] | None,
) -> list[Stage]:
    """The stages that learn, from a forward pass over one token. `num_outputs` of a shape; None: slots are points."""
    stages: dict[int, Stage] = {}
    with record_layers(model, operations) as tape:
        model.features(torch.zeros((1, 1), dtype=torch.long, device=model.head.weight.device))
    for record in filter(learns, tape.records):
        stage = stages.setdefault(stage_of(record.name), Stage(stage_of(record.name)))
        for name, parameter in record.layer.named_parameters():
            if parameter.requires_grad:
                stage.shapes[f"{record.name}.{name}"] = tuple(parameter.shape)
                if num_outputs is not None:
                    stage.slots[f"{record.name}.{name}"] = num_outputs(tuple(parameter.shape))
        if num_outputs is None:
            stage.slots[record.point] = record.point_width
            if record.name in model.stream_writers:
                stage.on_stream.add(record.point)
    return [stages[index] for index in sorted(stages)]
