"""Hidden units of an MLP that do nothing: taking them out changes no logit.

A unit without outgoing connections says nothing to anybody. One without incoming connections is a constant, the
activation of its bias; folded into the bias of the layer behind, it can go as well. What is left of their connections
goes with them. Under a hard top-k a unit matters by the place that it takes, so only units that are 0 may go.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heterodox.model.gpt import MLP


def remove_dead_units(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Bool[Tensor, " hidden"]]:
    """Zero, in place, all that belongs to dead units of the model's MLPs; for each MLP, by name, which units live.

    `masks` by parameter name say which entries exist; matrices without one have them all. The masks change alike.
    """
    alive = {}
    for name, mlp in model.named_modules():
        if not isinstance(mlp, MLP):
            continue
        into = masks.get(f"{name}.fc.weight", torch.ones_like(mlp.fc.weight, dtype=torch.bool))
        out = masks.get(f"{name}.proj.weight", torch.ones_like(mlp.proj.weight, dtype=torch.bool))
        dead = _dead(mlp, into, out)
        if mlp.fc.bias is not None and mlp.proj.bias is not None:
            constant = dead & ~into.any(dim=1)
            with torch.no_grad():
                said = mlp.proj.weight[:, constant] @ mlp.act(mlp.fc.bias[constant])
                mlp.proj.bias.add_(said)
        _clear(mlp, into, out, dead)
        alive[name] = ~dead
    return alive


def _dead(mlp: MLP, into: Tensor, out: Tensor) -> Bool[Tensor, " hidden"]:
    unfed, unheard = ~into.any(dim=1), ~out.any(dim=0)
    if isinstance(mlp.top_k, nn.Identity):
        return unfed | unheard
    return unfed if mlp.fc.bias is None else unfed & (mlp.fc.bias == 0)


@torch.no_grad()
def _clear(mlp: MLP, into: Tensor, out: Tensor, dead: Tensor) -> None:
    mlp.fc.weight[dead] = 0
    mlp.proj.weight[:, dead] = 0
    into[dead] = False
    out[:, dead] = False
    if mlp.fc.bias is not None:
        mlp.fc.bias[dead] = 0


# Inference with sparse matrices on a CPU: each layer in the form that was measured to be the faster one.
#
# A sparse layer is a CSR matrix with 32-bit indices, multiplied by PyTorch's own kernel (MKL's, where there is one).
# Below some density and above some size it beats the dense product; a layer where it does not stays dense. Dead hidden
# units of the MLPs are left out in either form.


class SparseLinear(nn.Module):
    """y = W x + b with W in CSR form, for any leading dimensions. Not for training."""

    def __init__(self, weight: Float[Tensor, "fan_out fan_in"], bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
            csr = weight.detach().to_sparse_csr()
            rows, columns = csr.crow_indices().int(), csr.col_indices().int()
            self.weight = torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape)
        self.bias = None if bias is None else bias.detach().clone()

    @property
    def num_bytes(self) -> int:
        """Of values and indices."""
        parts = (self.weight.values(), self.weight.col_indices(), self.weight.crow_indices())
        return sum(part.nbytes for part in parts)

    def forward(self, x: Float[Tensor, "*lead fan_in"]) -> Float[Tensor, "*lead fan_out"]:
        columns = x.reshape(-1, self.in_features).T
        if columns.shape[1] == 1:
            y = torch.mv(self.weight, columns[:, 0])[None]
        else:
            y = (self.weight @ columns.contiguous()).T
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class LayerTiming:
    """Median seconds of one layer in either form, and its bytes; `sparse_seconds` is None where no kernel runs it."""

    name: str
    shape: tuple[int, int]
    density: float
    dense_seconds: float
    sparse_seconds: float | None
    dense_bytes: int
    sparse_bytes: int

    @property
    def sparse_wins(self) -> bool:
        return self.sparse_seconds is not None and self.sparse_seconds < self.dense_seconds


@torch.no_grad()
def for_inference(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    alive: Mapping[str, Tensor] | None = None,
    *,
    rows: int = 1,
    rounds: int = 200,
) -> tuple[nn.Module, list[LayerTiming]]:
    """A copy of `model` whose masked linear layers are sparse where that is faster on inputs of so many rows.

    `masks` by parameter name; `alive` names, for each MLP, the hidden units to keep (default: all).
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for name, kept in (alive or {}).items():
        mlp = fast.get_submodule(name)
        assert isinstance(mlp, MLP)
        _narrow(mlp, kept)
    timings = []
    for name, layer in list(fast.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.weight" in masks:
            timing, sparse = _race(name, layer, rows, rounds)
            timings.append(timing)
            if sparse is not None and timing.sparse_wins:
                parent, _, own = name.rpartition(".")
                setattr(fast.get_submodule(parent), own, sparse)
    return fast, timings


def _narrow(mlp: MLP, kept: Tensor) -> None:
    """Leave out hidden units. A hard top-k of more than are left then keeps them all, as it should."""
    if bool(kept.all()):
        return
    bias = mlp.fc.bias is not None
    fc = nn.Linear(mlp.fc.in_features, int(kept.sum()), bias=bias, dtype=mlp.fc.weight.dtype)
    proj = nn.Linear(int(kept.sum()), mlp.proj.out_features, bias=bias, dtype=mlp.proj.weight.dtype)
    fc.weight.copy_(mlp.fc.weight[kept])
    proj.weight.copy_(mlp.proj.weight[:, kept])
    if bias:
        fc.bias.copy_(mlp.fc.bias[kept])
        proj.bias.copy_(mlp.proj.bias)
    mlp.fc, mlp.proj = fc.requires_grad_(False), proj.requires_grad_(False)
    if not isinstance(mlp.top_k, nn.Identity):
        mlp.top_k.k = min(mlp.top_k.k, int(kept.sum()))  # pyrefly: ignore[bad-argument-type]


def _race(name: str, layer: nn.Linear, rows: int, rounds: int) -> tuple[LayerTiming, SparseLinear | None]:
    """Both forms of a layer, in turn, on the same input."""
    x = torch.randn(rows, layer.in_features, dtype=layer.weight.dtype)
    sparse: SparseLinear | None = SparseLinear(layer.weight, layer.bias)
    assert sparse is not None
    num_bytes = sparse.num_bytes
    try:
        close = torch.allclose(sparse(x), layer(x), rtol=1e-3, atol=1e-4)
        assert close, f"the sparse form of {name} computes something else"
        dense_seconds, sparse_seconds = _medians((lambda: layer(x), lambda: sparse(x)), rounds)
    except RuntimeError:  # this build of PyTorch has no such kernel
        sparse, sparse_seconds = None, None
        (dense_seconds,) = _medians((lambda: layer(x),), rounds)
    density = float((layer.weight != 0).double().mean())
    shape = (layer.out_features, layer.in_features)
    timing = LayerTiming(name, shape, density, dense_seconds, sparse_seconds, layer.weight.nbytes, num_bytes)
    return timing, sparse


def _medians(calls: tuple[Callable[[], Tensor], ...], rounds: int) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 5):
        for call, taken in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if number >= 5:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]
