"""Where equilibrium propagation cannot work, and why."""

from typing import Any

import torch

from heterodox.credit.jacobian import penalty_refusals

PLAIN = frozenset({"name", "layers", "heads", "width", "context", "mlp_ratio", "bias", "vocab_size"})
"""Options of the GPT that leave its layers fixed functions with a true derivative."""
DROWNED = 100
"""So many roundings of its state a nudge must be long; then they are 1 to 3 % of what is read off, and below more."""


def refusals(credit: Any, recipe: Any) -> list[str]:
    """Why the rule with the options `credit` cannot run within `recipe`."""
    model, reasons = recipe.model, _beta(credit.beta, recipe.run.precision)
    if model.name not in ("equilibrium", "gpt"):
        reasons.append(f"credit equilibrium needs model equilibrium or gpt, found {model.name}")
    if model.name == "gpt":
        reasons += _on_gpt(credit, model)
    if credit.clip is not None and credit.correction == "none":
        reasons.append("credit.clip limits a correction that credit.correction none has not")
    return reasons + penalty_refusals(credit)


def _beta(beta: float, precision: str) -> list[str]:
    if beta == 0:
        return ["credit.beta is 0: without a nudge nothing can be read off; expected another number, such as 0.01"]
    if precision == "bfloat16":
        return ["credit equilibrium needs run.precision float32 or float64: a nudge drowns in bfloat16's 3 digits"]
    least = DROWNED * torch.finfo(getattr(torch, precision)).eps
    if abs(beta) < least:
        return [
            f"credit.beta {beta:g} drowns in the rounding of run.precision {precision}; expected at least {least:.1g} "
            "in size, such as 0.01"
        ]
    return []


def _on_gpt(credit: Any, model: Any) -> list[str]:
    """On a feed-forward model the rule is backprop, with the steps that carry a nudge down one layer each."""
    reasons = []
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if key not in PLAIN and value != field.default:
            reasons.append(
                f"credit equilibrium needs layers that are fixed functions with a true derivative: model.{key} is "
                f"{value!r}, expected {field.default!r}"
            )
    if credit.nudged_steps is not None and credit.nudged_steps <= model.layers:
        reasons.append(
            f"credit.nudged_steps {credit.nudged_steps} do not carry a nudge down {model.layers} layers to the "
            f"embeddings; expected at least {model.layers + 1}"
        )
    if credit.step_size not in (None, 1):
        reasons.append(
            f"credit.step_size is {credit.step_size:g}: on model gpt only steps of 1 carry a nudge, whole, down one "
            "layer each; expected null or 1"
        )
    if credit.solver != "damped":
        reasons.append(
            f"credit.solver is {credit.solver}: on model gpt {model.layers + 1} plain steps are exact, and a mixture "
            "of them is not; expected damped"
        )
    if credit.tolerance is not None:
        reasons.append(
            f"credit.tolerance is {credit.tolerance:g}: on model gpt {model.layers + 1} steps are exact, and to stop "
            "sooner leaves the lowest layers without credit; expected null"
        )
    if credit.nudged_limit not in (None, type(credit).model_fields["nudged_limit"].default):
        reasons.append(
            f"credit.nudged_limit is {credit.nudged_limit:g}, but on model gpt the nudged phases end exactly, and "
            "nothing is left to settle; leave it out"
        )
    if credit.jacobian_penalty:
        reasons.append("credit.jacobian_penalty is for model equilibrium: a feed-forward model is always contractive")
    return reasons
