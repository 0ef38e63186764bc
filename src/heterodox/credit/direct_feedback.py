"""Direct feedback alignment: the output error reaches every layer at once, through fixed random matrices."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.base import Elsewhere, backprop_elsewhere, elsewhere_refusals, feedback_manifest
from heterodox.credit.feedback import FeedbackOptions
from heterodox.credit.tape import POINTWISE, Record, Tape, error_through, random_state, record_layers
from heterodox.model import CausalMix, HardTopK, ResidualGate

Route = Literal["stream", "own"]
STREAM = "stream"


class DirectFeedback:
    """Direct feedback alignment: the output error reaches every layer at once, through fixed random matrices.

        route: own       δ_l = (e B_l) ⊙ f'(a_l),          e = ∂L/∂logits
        route: stream    s = J_normᵀ (e B),   δ_l = s          where layer l writes to the residual stream
                                              δ_l = J_fᵀ (s C_l)   where it feeds a branch's non-linearity f

    There is no backward pass through the blocks, and no graph: the forward pass keeps each layer's input, and once the
    error is known all layers learn independently of each other. The output layer is exact.

    `own` is direct feedback to the letter: a matrix of its own for each layer, straight from the logits. In a
    transformer it stays behind training the head alone (docs/rules/direct_feedback.md shows the ablation), for three
    reasons that `stream` mends without any transposed weight. All layers that add to the residual stream have the same
    true error, so they share one B, and the head needs to align with one matrix only. The final norm's own derivative
    is applied. And q, k and v learn behind the derivative of the attention that mixes them (f above, as the GELU is for
    fc): the error of one position is the fault of others. The few gains of norms learn from s as it is. Where a
    residual gate or dropout stands between l and the stream, its derivative, mask included, is applied to s. The
    stream's bottlenecks are not: s passes them as if they were not there.

    Reference: Nøkland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016; for
    transformers Launay, Poli, Boniface and Krzakala, "Direct feedback alignment scales to modern deep learning tasks
    and architectures", NeurIPS 2020 (who backpropagate within a block; here no error passes any layer's weights).

    Fixed matrices from the logits' error to the layers; no error passes a layer's weights.
    """

    class Config(FeedbackOptions):
        name: Literal["direct_feedback"] = "direct_feedback"
        route: Route = Field("stream", description="own: each layer's own matrix from the logits, to the letter")
        elsewhere: Elsewhere = "local"

        def refusals(self, recipe: config.Config) -> list[str]:
            reasons = super().refusals(recipe)
            whole = recipe.model_dump(include={"model", "run"})
            dropout = whole["model"].get("dropout")
            again = self.route == "stream" or whole["model"].get("sigmoid_bias") == "learned"
            if whole["run"]["compile"] and dropout and again:
                reasons.append(
                    f"direct_feedback draws its dropout masks a second time (model.dropout is {dropout}), which a "
                    "compiled model does not let it; make run.compile false or the dropout 0"
                )
            return reasons or elsewhere_refusals(self.name, self.elsewhere, recipe)

        def build(self, model: LanguageModel, streams: Streams) -> "DirectFeedback":
            vocab, width = model.head.out_features, model.head.in_features
            shapes = {STREAM: (vocab, width)} if self.route == "stream" else {}
            for record in _tape_of(model, self.route).records:
                layer, point = record.layer, record.point
                learns = record.learns and (isinstance(layer, nn.Linear) or self.elsewhere == "local")
                on_stream = self.route == "stream" and _takes_stream_error(model, record)
                if learns and layer is not model.head and not on_stream:
                    shapes[point] = (vocab if self.route == "own" else width, record.point_width)
            matrices = {
                point: self.draw(*shape, streams, point).to(model.head.weight) for point, shape in shapes.items()
            }
            return DirectFeedback(matrices, route=self.route, elsewhere=self.elsewhere)

    def __init__(
        self,
        feedback: Mapping[str, Float[Tensor, "error width"]],
        *,
        route: Route = "stream",
        elsewhere: Elsewhere = "local",
    ) -> None:
        self.feedback = dict(feedback)
        self.route: Route = route
        self.elsewhere: Elsewhere = elsewhere

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        before = random_state(model.head.weight.device)
        with torch.no_grad(), record_layers(model, _OPERATIONS[self.route]) as tape:
            logits = model(batch.inputs)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = objective.losses(leaf, batch)
            loss = (losses * weights).mean()
            (error,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            grads = direct_gradients(tape, self._errors(model, tape, error))
        cost = Cost(tokens=batch.num_tokens, flops=self._flops(model, batch))
        if self.elsewhere == "backprop":
            exact, extra = backprop_elsewhere(model, batch, weights, objective, before)
            grads |= exact
            cost += extra
        return Signal(grads, loss.detach(), losses.detach(), cost)

    def _errors(
        self, model: LanguageModel, tape: Tape, error: Float[Tensor, "batch time vocab"]
    ) -> Callable[[Record], Tensor | None]:
        """The error at each record's point; None for a layer that learns nothing here."""
        if self.route == "own":

            def own(record: Record) -> Tensor | None:
                if record.layer is model.head:
                    return error
                matrix = self.feedback.get(record.point)
                return None if matrix is None else error @ matrix.to(error.dtype)

            return own

        entering = error @ self.feedback[STREAM].to(error.dtype)
        final = next(record for record in tape.records if record.layer is model.ln_f)
        stream = error_through(model.ln_f, final.source.held, entering)
        latest: list[tuple[str, Tensor]] = []  # q, k and v share a point

        def along(record: Record) -> Tensor | None:
            if record.layer is model.head:
                return error
            if self.elsewhere != "local" and not isinstance(record.layer, nn.Linear):
                return None
            if record.layer is model.ln_f:
                return entering
            if _takes_stream_error(model, record):
                return stream
            if not latest or latest[0][0] != record.point:
                latest[:] = [(record.point, stream @ self.feedback[record.point].to(stream.dtype))]
            return latest[0][1]

        return along

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return feedback_manifest(model, self.elsewhere)

    def _flops(self, model: LanguageModel, batch: Batch) -> int:
        forward = model.forward_flops(*batch.inputs.shape)
        projections = 2 * batch.num_tokens * sum(matrix.numel() for matrix in self.feedback.values())
        if self.route == "stream":
            again = 3 * forward.attention  # once more, and back
        elif self.elsewhere == "local" and any(parameter.requires_grad for parameter in _of_mixes(model)):
            again = 3 * forward.attention // 2  # once more, and back to the weights
        else:
            again = 0
        return forward.total + forward.linear + forward.head + projections + again

    def state(self) -> Tree:
        return {"feedback": self.feedback}

    def load_state(self, tree: Tree) -> None:
        restore(self.feedback, tree.get("feedback", {}), "feedback matrix")


_OPERATIONS: dict[Route, tuple[type[nn.Module], ...]] = {
    "own": (*POINTWISE, HardTopK),
    "stream": (*POINTWISE, HardTopK, CausalMix, ResidualGate, nn.Dropout),
}


def _of_mixes(model: LanguageModel) -> Iterator[nn.Parameter]:
    """What attention learns between its projections."""
    for module in model.modules():
        if isinstance(module, CausalMix):
            yield from module.parameters()


@torch.no_grad()
def _tape_of(model: LanguageModel, route: Route) -> Tape:
    """The tape of a forward pass over one token, for the sake of its layers and shapes."""
    device = model.head.weight.device
    with record_layers(model, _OPERATIONS[route]) as tape:
        model(torch.zeros((1, 1), dtype=torch.long, device=device))
    return tape


def _takes_stream_error(model: LanguageModel, record: Record) -> bool:
    """Whether a layer learns from the stream's error as it is: it writes to the stream, or it is a norm (whose few
    gains are not worth a matrix)."""
    return record.name in model.stream_writers or isinstance(record.layer, nn.LayerNorm)


def direct_gradients(tape: Tape, error_at: Callable[[Record], Tensor | None]) -> dict[str, Tensor]:
    """Every layer's parameter gradients, from the error that `error_at` says stands at the layer's point.

    Layers for which it says `None` get none. Usable on the tape of any module; see `record_layers`.
    """
    grads: dict[str, Tensor] = {}
    for record in tape.records:
        error = error_at(record)
        if error is not None:
            grads.update(tape.gradients(record, error))
    return grads
