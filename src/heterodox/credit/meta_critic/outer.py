"""The structure `outer`: ΔW = Σ_t δ_t x_tᵀ, with δ_t by the critic for each token and x_t the matrix's own input.

A critic of this kind has as many outputs as a layer is wide, not as it has weights. δ enters at a layer's point: its
own output (`point: output`), or, as in direct feedback, behind the branch's function that consumes it (`point:
branch`): fc behind its GELU, q, k and v behind attention, by that function's own derivative and no weight. Biases,
gains and embeddings learn from δ as they do from a true error.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from heterodox.credit.meta_critic.layout import stage_of
from heterodox.credit.meta_critic.mask import largest, units_kept
from heterodox.credit.tape import Record, Tape


def outer_products(
    tape: Tape, learns: Callable[[Record], bool], stage: int, errors: Mapping[str, Float[Tensor, "batch time width"]]
) -> dict[str, Tensor]:
    """ΔW by parameter name for the layers of a stage, differentiable in the errors at their points."""
    found: dict[str, Tensor] = {}
    for record in tape.records:
        if learns(record) and stage_of(record.name) == stage:
            found.update(tape.gradients(record, errors[record.point]))
    return found


def keep_tokens(error: Float[Tensor, "batch time width"], density: float) -> Float[Tensor, "batch time width"]:
    """The largest errors of each example, `density` of them, the others 0: each is a rank-one term of ΔW."""
    keep = units_kept(density, error.shape[1])
    if keep == error.shape[1]:
        return error
    return error * largest(error.detach().norm(dim=-1), keep).to(error.dtype)[..., None]
