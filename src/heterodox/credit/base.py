"""Parameters that are no linear layer's: embeddings, norms, gates. `elsewhere` says how they learn.

- `local` (default): from the rule's own signal, as it arrives at them. No transposed weights.
- `backprop`: the exact gradient, from a second, ordinary forward and backward pass that the rule is charged for. It
  draws the same dropout masks as the first.
- `frozen`: not at all.
"""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.backprop import differentiate, frozen, trainable
from heterodox.credit.feedback import feedback_path, linear_layers
from heterodox.credit.tape import RandomState, random_state, replayed

Elsewhere = Literal["backprop", "local", "frozen"]


def elsewhere_refusals(rule: str, elsewhere: Elsewhere, recipe: config.Config) -> list[str]:
    """Why `rule` cannot treat these parameters so within `recipe` (the whole one)."""
    whole = recipe.model_dump(include={"model", "run"})
    dropout = whole["model"].get("dropout")
    if not (elsewhere == "backprop" and dropout and whole["run"]["compile"]):
        return []
    return [
        f"{rule} with credit.elsewhere backprop draws its dropout masks a second time (model.dropout is {dropout}), "
        "which a compiled model does not let it; make run.compile false or the dropout 0"
    ]


def elsewhere_names(model: nn.Module) -> list[str]:
    """Names of the trainable parameters that belong to no linear layer."""
    inside = {f"{layer}." for layer in linear_layers(model)}
    return [name for name in trainable(model) if name[: name.rfind(".") + 1] not in inside]


def feedback_manifest(model: LanguageModel, elsewhere: Elsewhere) -> dict[str, Origin]:
    """The manifest of a rule that is exact in the head, sends feedback to all linear layers, and `elsewhere`."""
    signal: dict[Elsewhere, Origin] = {"local": "feedback", "backprop": "backprop", "frozen": "frozen"}
    origins: dict[str, Origin] = {name: "feedback" for name, _ in model.named_parameters()}
    origins |= dict.fromkeys(elsewhere_names(model), signal[elsewhere])
    origins["head.weight"] = "exact"
    return origins | frozen(model)


def backprop_elsewhere(
    model: LanguageModel,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    before: RandomState,
) -> tuple[dict[str, Tensor], Cost]:
    """The exact gradients of the parameters elsewhere, and what the second pass costs (no new tokens).

    `before` is the random state from which the first pass was made. Where nothing elsewhere learns, there is no second.
    """
    names = elsewhere_names(model)
    if not names:
        return {}, Cost()
    with replayed(before, model.head.weight.device):
        exact = differentiate(model, batch, weights, objective, names)
    forward = model.forward_flops(*batch.inputs.shape)
    return exact.grads, Cost(flops=forward.total + forward.input_gradients)


# The signal that all rules with a backward pass through feedback matrices share.


def through_feedback(
    model: LanguageModel,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]],
    elsewhere: Elsewhere,
) -> Signal:
    """What autograd says if each linear layer named by `feedback` sends errors back through that matrix, not its own.

    The head's gradient does not depend on any of them. `elsewhere` says how embeddings and norms learn.
    """
    names = [n for n, origin in feedback_manifest(model, elsewhere).items() if origin in ("feedback", "exact")]
    before = random_state(model.head.weight.device)
    with feedback_path(model, feedback):
        signal = differentiate(model, batch, weights, objective, names)
    signal.cost = Cost(tokens=batch.num_tokens, flops=model.forward_flops(*batch.inputs.shape).with_backward)
    if elsewhere == "backprop":
        grads, cost = backprop_elsewhere(model, batch, weights, objective, before)
        signal.grads |= grads
        signal.cost += cost
    return signal
