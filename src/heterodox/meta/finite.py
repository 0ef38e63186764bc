"""Why a meta-gradient is not finite."""

from jaxtyping import Float
from torch import Tensor

CHAOTIC = (
    "the inner run is chaotic, its end depends on every step without bound. Lower its learning rate or warm it up, "
    "enlarge its batches, give it something to learn, or differentiate fewer steps"
)


def why_not_finite(
    val_loss: Float[Tensor, ""],
    losses: list[Tensor],
    adjoint_norms: Float[Tensor, " steps_and_end"],
    derivatives: list[Tensor],
) -> str | None:
    """One sentence, or None if all of the derivatives are finite; `adjoint_norms[k]` is k steps before the end."""
    if all(derivative.isfinite().all() for derivative in derivatives):
        return None
    found = "the meta-gradient is not finite: "
    for step, loss in enumerate(losses):
        if not loss.isfinite().all():
            return f"{found}a loss of inner step {step} is not; lower the inner learning rate, or clip its gradients"
    if not val_loss.isfinite():
        return f"{found}the validation loss is {float(val_loss)}; lower the inner learning rate, or clip its gradients"
    bad = (~adjoint_norms.isfinite()).nonzero()
    if not len(bad):
        return f"{found}losses and adjoints are; look for an infinite derivative in what computes the weights"
    back = int(bad[0])
    if not back:
        return f"{found}the validation loss is, but not its gradient in the model's weights"
    before = adjoint_norms[:back]
    kind = str(adjoint_norms.dtype).removeprefix("torch.")
    return (
        f"{found}the norm of the adjoint grew from {float(before[0]):.3g} to {float(before.max()):.3g} on the way back "
        f"and left {kind} {back} steps before the end, though every loss is finite: {CHAOTIC}"
    )
