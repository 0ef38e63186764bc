"""From options and a model to the rule's parts."""

import math
from functools import partial

from torch import nn

from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.credit.meta_critic.config import Options
from heterodox.credit.meta_critic.critics import Critics
from heterodox.credit.meta_critic.layout import Stage, chosen, stages_of
from heterodox.credit.meta_critic.optimiser import MetaOptimiser
from heterodox.credit.meta_critic.proposals import Proposals
from heterodox.credit.meta_critic.schedule import Schedule
from heterodox.credit.meta_critic.structure import Structure
from heterodox.credit.meta_critic.transport import Transport
from heterodox.credit.tape import POINTWISE
from heterodox.model import GPT, CausalMix, HardTopK, ResidualGate

Operations = tuple[type[nn.Module], ...]
BRANCHES: Operations = (*POINTWISE, HardTopK, CausalMix, ResidualGate, nn.Dropout)
"""What stands between a layer and the place where an error enters, with `point: branch`."""
BETAS = (0.9, 0.99)


def operations_of(options: Options) -> Operations:
    """What the tape follows errors through."""
    return BRANCHES if options.structure == "outer" and options.point != "output" else ()


def proposals_of(options: Options, model: GPT, streams: Streams) -> Proposals:
    """Critics for the stages of `model` that learn.

    Raises `RecipeError` for a structure that an embedding cannot have, and above `max_meta_parameters`.
    """
    structure = options.structure_part()
    learns = chosen(model, options.matrices, options.embeddings == "critic")
    num_outputs = None if structure is None else partial(_num_outputs, structure)
    stages = stages_of(model, operations_of(options), learns, num_outputs)
    if structure is not None:
        _check_fit(structure, stages)
    weight = model.head.weight
    target_width = options.target_width or weight.shape[1]
    critics = Critics(
        stages,
        streams,
        like=weight,
        width=weight.shape[1],
        target=options.target,
        target_width=target_width,
        target_hidden=options.target_hidden,
        local_width=options.local_width or target_width,
        local_density=options.local_density,
        form=options.critic,
        hidden=options.critic_hidden,
        linear=options.linear,
        shared=options.shared,
        begins_as_stream=options.begins_as_stream,
        transport=None
        if options.transport == "none"
        else Transport(range(stages[0].index + 1, len(model.blocks)), weight.shape[1], target_width, streams, weight),
    )
    size, most = sum(parameter.numel() for parameter in critics.parameters()), options.max_meta_parameters
    if most is not None and size > most:
        raise RecipeError(
            f"critics and MLP_G would have {size:,} parameters, above credit.max_meta_parameters {most:,}; make "
            "credit.critic_hidden or credit.local_width smaller"
        )
    return Proposals(critics, stages, learns, target=options.target, structure=structure, density=options.density)


def optimiser_of(options: Options, proposals: Proposals) -> MetaOptimiser:
    """AdamW for critics and MLP_G, each with its learning rate."""
    parameters = dict(proposals.critics.named_parameters())
    target_lr = options.target_lr or options.meta_lr
    return MetaOptimiser(
        parameters,
        {name: target_lr if name.startswith("target.") else options.meta_lr for name in parameters},
        betas=BETAS,
        weight_decay=options.meta_weight_decay,
        warmup=options.meta_warmup,
    )


def schedule_of(options: Options) -> Schedule:
    """What depends on the step."""
    return Schedule(
        training=options.objective,
        regression_steps=options.regression_steps,
        layers_per_step=options.layers_per_step,
        meta_every=options.meta_every,
        meta_only_steps=options.meta_only_steps,
        proposal_warmup=options.proposal_warmup,
        joint_every=options.joint_every,
    )


def _check_fit(structure: Structure, stages: list[Stage]) -> None:
    """What `Options.refusals` cannot know: embeddings are as large as the vocabulary."""
    for name, shape in ((name, shape) for stage in stages for name, shape in stage.shapes.items()):
        if len(shape) == 2 and (misfit := structure.misfit(shape)):
            raise RecipeError(f"{misfit} {name} of {shape[0]} × {shape[1]}; make credit.embeddings frozen")


def _num_outputs(structure: Structure, shape: tuple[int, ...]) -> int:
    """How many numbers a critic says of a parameter: a vector is itself."""
    return structure.num_outputs(shape) if len(shape) == 2 else math.prod(shape)
