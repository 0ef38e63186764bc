"""Equilibrium propagation in the source's setting: how close to BPTT, and at what cost.

One damped attention block (no norm, no MLP), width 128, 4 heads, context 64, batch 16, damping 1, untrained weights:

    python bench/equilibrium.py
    python bench/equilibrium.py data.path=tinyshakespeare.txt

Cosines are with BPTT through the same free phase, per matrix; times are medians of alternating rounds, over BPTT's. The
source's schedule takes 120 free and 20 nudged steps at ε = 0.1, with its clip, its nudge at moving states and its β;
"step by step" also computes it as the source does, a Jacobian product from scratch at each step of each phase. "5 + 4
steps" are free and nudged ones at our ε: as many as it takes to be no further from BPTT than the source's schedule.
Arguments are recipe overrides, and --rounds N, --threads N.
"""

import argparse
import statistics
from functools import partial

import torch
from timing import alternate, ratio
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.app.recipe import load_recipe
from heterodox.app.session import open_session
from heterodox.core.comm import Solo
from heterodox.core.protocols import Credit
from heterodox.core.types import Batch, Cost, Signal
from heterodox.credit import BPTT, Equilibrium, Implicit
from heterodox.credit.equilibrium.shared import read_out
from heterodox.model import Equilibrium as Model
from heterodox.objective import CrossEntropy

SETTING = {
    "credit": "equilibrium",
    "data": {"tokenizer": "char"},
    "model": {"name": "equilibrium", "mlp_ratio": 0, "layer_norm": False, "weight_std": 128**-0.5},
    "run": {"batch_size": 16, "device": "cpu"},
}
SOURCE_BETA = 0.02 / (16 * 64)  # the source nudges by the mean over the tokens of a batch, we by their sum
MATRICES = [f"blocks.0.attn.{part}.weight" for part in "qkvo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    session = open_session(load_recipe(SETTING, arguments.overrides), Solo(), "cpu")
    batches = [session.loader.next_batch() for _ in range(4)]
    models = {"ours": as_in_the_source(session.model), "source": as_in_the_source(session.model)}
    models["source"].steps, models["source"].step_size = 120, 0.1
    models["short"] = as_in_the_source(session.model)
    models["short"].steps = 5
    free = models["ours"].steps

    rules: dict[str, tuple[Credit | StepByStep, Model]] = {
        f"BPTT, {free} steps": (BPTT(), models["ours"]),
        "implicit": (Implicit(), models["ours"]),
        "equilibrium (defaults)": (Equilibrium(), models["ours"]),
        "equilibrium, 5 + 4 steps": (Equilibrium(nudged_steps=4, nudged_limit=None), models["short"]),
        "equilibrium, plain": (Equilibrium(corrected=False, nudged_limit=None), models["ours"]),
        "BPTT, the source's 120 steps": (BPTT(), models["source"]),
        "the source's schedule": (source_schedule(), models["source"]),
        "the source's, step by step": (StepByStep(), models["source"]),
        "the source's, plain": (source_schedule(corrected=False), models["source"]),
    }
    first = next(iter(rules))
    truth = gradient(*rules[first], batches[0]).grads
    times = alternate({n: partial(gradient, *rule) for n, rule in rules.items()}, batches, arguments.rounds, 2)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds, float32")
    print(f"{'':30}{'Q':>9}{'K':>9}{'V':>9}{'O':>9}{'ms':>9}{'over BPTT':>11}{'GFLOPs':>8}")
    for name, rule in rules.items():
        signal = gradient(*rule, batches[0])
        cells = "".join(f"{cosine(signal.grads[matrix], truth[matrix]):9.5f}" for matrix in MATRICES)
        quotient = ratio(times[name], times[first])
        flops = signal.cost.flops / 1e9
        print(f"{name:30}{cells}{statistics.median(times[name]):9.1f}{quotient:11.2f}{flops:8.2f}")
    print()
    for name in ("the source's schedule", "the source's, step by step"):
        for ours in ("equilibrium (defaults)", "equilibrium, 5 + 4 steps"):
            print(f"{name}: {ratio(times[name], times[ours]):.1f} times as long as {ours}")
    print(f"spectral radius and residual: {models['ours'].diagnose(batches[0].inputs).values}")


def source_schedule(corrected: bool = True) -> Equilibrium:
    return Equilibrium(
        beta=SOURCE_BETA,
        beta_unit="gradient",
        corrected=corrected,
        live=True,
        nudged_steps=20,
        step_size=0.1,
        clip=1.0 if corrected else None,
        nudged_limit=None,
    )


class StepByStep:
    """The source's schedule as the source computes it: each phase by itself, each Jacobian product from scratch."""

    def signal(self, model: Model, batch: Batch, weights: Tensor, objective: CrossEntropy) -> Signal:
        dynamics, block, size = model.dynamics(batch.inputs), model.blocks[0], model.step_size
        with torch.no_grad():
            rest = dynamics.settle().state
        readout = read_out(model, rest[-1], batch, weights, objective)

        def nudged(strength: float) -> Tensor:
            z = rest.clone()
            for _ in range(20):
                with torch.no_grad():
                    pull = dynamics.force(z)
                pull[-1] -= strength * read_out(model, z[-1], batch, weights, objective).nudge
                v = (z - rest)[0]
                with sdpa_kernel(SDPBackend.MATH):
                    forth = torch.autograd.functional.jvp(block, rest[0], v)[1]
                    back = torch.autograd.functional.vjp(block, rest[0], v)[1]
                correction = forth - back
                correction *= (pull.norm() / correction.norm().clamp_min(1e-8)).clamp(max=1)
                z = z + size * (pull - correction)
            return z

        adjoint = (nudged(-SOURCE_BETA) - nudged(SOURCE_BETA)) / (2 * SOURCE_BETA * batch.num_tokens)
        parameters = [model.get_parameter(name) for name in MATRICES]
        grads = torch.autograd.grad(dynamics.drive(rest), parameters, adjoint)
        return Signal(dict(zip(MATRICES, grads, strict=True)), readout.loss, readout.losses, Cost())


def as_in_the_source(model: nn.Module) -> Model:
    """The same weights, but for small embeddings, a large head and no final norm."""
    assert isinstance(model, Model)
    copy = Model(vocab_size=model.head.out_features, heads=4, width=128, context=64, mlp_ratio=0, layer_norm=False)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for embedding in (copy.tok_emb, copy.pos_emb):
            embedding.weight.mul_(0.02 / embedding.weight.std())
    copy.ln_f = nn.Identity()
    return copy


def gradient(credit: Credit | StepByStep, model: Model, batch: Batch) -> Signal:
    return credit.signal(model, batch, torch.ones(len(batch.inputs)), CrossEntropy())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


if __name__ == "__main__":
    main()
