"""The meta-gradient through T Adam steps of a 0.8 M-parameter GPT: time and peak memory, ours and others'.

    python bench/meta_gradient.py --steps 4 16 64 256 --methods sqrt sqrt+8 binomial all unroll higher torchopt

Each measurement is a process of its own: its peak resident memory less what it held before the gradient, and the
seconds of one gradient. Of ours, a method is a schedule, and behind + how many steps' graphs are kept at a time
(default 1). Every contestant trains the same model on the same weighted batches by the same Adam (no clip and no decay,
which not all of the others have) and differentiates the same validation loss in the weights. The sum of what it found
is printed, so that one sees that they agree; higher has its ε elsewhere, so it does not quite. `unroll` is autograd
through every step, without a library. A contestant that needs more than --limit-gb is stopped. higher and torchopt come
with the `bench` extra.

Tokens are random, which do for time and memory. There is nothing to learn from them, though: from some hundred steps on
the run is chaotic and its derivative leaves float32. Through long windows, take windows of a --text and a small --lr;
the norm of our adjoint, told at five places from the end to the start, says how far the derivative is from that:

    python bench/meta_gradient.py --steps 1500 --methods sqrt --batch 4 --lr 1e-4 --text tinyshakespeare.txt
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import random_batches
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.core.rng import Streams
from heterodox.core.types import Batch
from heterodox.meta import InnerAdamW, meta_gradient
from heterodox.model import GPT
from heterodox.objective import CrossEntropy

BETAS, EPS, EPS_ROOT = (0.9, 0.99), 1e-8, 1e-12
OURS = ("sqrt", "sqrt+8", "binomial", "all")
PLACES = 5
"""Where along the unroll the norm of the adjoint is told, from its end to its start."""


class Problem(NamedTuple):
    """The model, training and validation batches, the weights of the examples at each step, the learning rate."""

    model: GPT
    batches: list[Batch]
    validation: list[Batch]
    weights: list[Tensor]
    lr: float


Found = tuple[list[Tensor], list[float]]
"""The derivative in the weights of each step, and of ours the norms of the adjoint."""


def losses(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return CrossEntropy().losses(model(batch.inputs), batch)


def problem(options: argparse.Namespace, steps: int) -> Problem:
    model = GPT.Config().build(options.vocab, Streams(0))
    if options.text:
        batches = text_batches(options.text, options.batch, 64, steps + 1)
    else:
        batches = random_batches(options.vocab, options.batch, 64, steps + 1)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(options.batch, generator=generator).requires_grad_() for _ in range(steps)]
    return Problem(model, batches[:-1], batches[-1:], weights, options.lr)


def text_batches(path: Path, batch: int, context: int, count: int) -> list[Batch]:
    """Windows at random places of a text, one token per character, by its rank among those that occur."""
    text = path.read_text("utf-8")
    rank = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([rank[character] for character in text])
    starts = torch.randint(len(tokens) - context, (count, batch, 1), generator=torch.Generator().manual_seed(0))
    windows = tokens[starts + torch.arange(context + 1)]
    return [Batch(window[:, :-1], window[:, 1:], torch.arange(batch)) for window in windows]


def ours(given: Problem, method: str) -> Found:
    schedule, _, graphs = method.partition("+")
    model, batches, validation, weights, _ = given
    by_batch = {id(batch): w.detach() for batch, w in zip(batches, weights, strict=True)}
    update = InnerAdamW(given.lr, BETAS, EPS, EPS_ROOT, weight_decay=0.0)
    found = meta_gradient(
        model,
        losses,
        batches,
        lambda batch: by_batch[id(batch)],
        validation,
        update,
        schedule=schedule,
        graphs=int(graphs or 1),
        check=False,
    )
    places = torch.linspace(0, len(batches), PLACES).round().long()
    return found.weight_grads, found.adjoint_norms[places].tolist()


def unroll(given: Problem) -> Found:
    model, batches, validation, weights, lr = given
    names = [name for name, _ in model.named_parameters()]
    theta = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]

    def at(values: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tokens: functional_call(model, dict(zip(names, values, strict=True)), (tokens,))

    for t, (batch, w) in enumerate(zip(batches, weights, strict=True), start=1):
        grads = torch.autograd.grad((w * losses(at(theta), batch)).mean(), theta, create_graph=True)
        m = [BETAS[0] * a + (1 - BETAS[0]) * g for a, g in zip(m, grads, strict=True)]
        v = [BETAS[1] * a + (1 - BETAS[1]) * g * g for a, g in zip(v, grads, strict=True)]
        c1, c2 = 1 - BETAS[0] ** t, 1 - BETAS[1] ** t
        theta = [p - lr / c1 * a / ((b / c2 + EPS_ROOT).sqrt() + EPS) for p, a, b in zip(theta, m, v, strict=True)]
    return list(torch.autograd.grad(losses(at(theta), validation[0]).mean(), weights)), []


class Plain(torch.nn.Module):
    """The same model without an abstract base class, beside which higher cannot put its own."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb, self.blocks, self.ln_f, self.head = (
            getattr(gpt, name) for name in ("tok_emb", "pos_emb", "blocks", "ln_f", "head")
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def by_higher(given: Problem) -> Found:
    import higher

    gpt, batches, validation, weights, _ = given
    model = Plain(gpt)
    optimizer = torch.optim.Adam(model.parameters(), lr=given.lr, betas=BETAS, eps=EPS)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=True) as (inner, steps):
        for batch, w in zip(batches, weights, strict=True):
            steps.step((w * losses(inner, batch)).mean())
        return list(torch.autograd.grad(losses(inner, validation[0]).mean(), weights)), []


def by_torchopt(given: Problem) -> Found:
    import torchopt

    model, batches, validation, weights, _ = given
    optimizer = torchopt.MetaAdam(model, lr=given.lr, betas=BETAS, eps=EPS, eps_root=EPS_ROOT)
    for batch, w in zip(batches, weights, strict=True):
        optimizer.step((w * losses(model, batch)).mean())
    return list(torch.autograd.grad(losses(model, validation[0]).mean(), weights)), []


def measure(method: str, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, peak bytes, a checksum and norms of the adjoint, within this process."""
    torch.set_num_threads(options.threads)
    if options.limit_gb:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.limit_gb * 2**30),) * 2)
    with sdpa_kernel(SDPBackend.MATH):  # the one kernel that can be differentiated twice
        warm = problem(options, 1)
        contestants = {"unroll": unroll, "higher": by_higher, "torchopt": by_torchopt}
        run = contestants.get(method) or (lambda given: ours(given, method))
        run(warm)
        given = problem(options, steps)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, cpu = time.perf_counter(), time.process_time()
        grads, norms = run(given)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    total = float(torch.stack(grads).abs().sum())
    return {"seconds": seconds, "cpu": cpu, "peak": 1024.0 * peak, "sum": total, "norms": norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--methods", nargs="+", default=[*OURS, "unroll", "higher", "torchopt"])
    for name, default in {"batch": 12, "vocab": 65, "threads": 1, "rounds": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the inner model")
    parser.add_argument("--text", type=Path, help="a file whose windows to train on; default: random tokens")
    parser.add_argument("--limit-gb", type=float, default=16.0)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "STEPS"), help="measure one in this process")
    options = parser.parse_args()
    if options.text:
        options.vocab = len(set(options.text.read_text("utf-8")))
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options)))
        return
    print(f"torch {torch.__version__}, batch {options.batch}, {options.threads} threads, medians of {options.rounds}")
    print(f"{'T':>5} {'method':10}{'seconds':>9}{'CPU s':>8}{'peak MB':>9}{'Σ|∂L/∂w|':>14}  ‖λ‖, end to start")
    for steps in options.steps:
        for method in options.methods:
            command = [sys.executable, *sys.argv, "--one", method, str(steps)]
            rows, error = [], ""
            for _ in range(options.rounds):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    error = (done.stderr.strip().splitlines() or ["killed"])[-1][:80]
                    break
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            if not rows:
                print(f"{steps:5} {method:10} {error}", flush=True)
                continue
            norms = " ".join(f"{norm:.3g}" for norm in rows[-1].pop("norms"))
            cells = {key: statistics.median(row[key] for row in rows) for key in rows[-1]}
            print(
                f"{steps:5} {method:10}{cells['seconds']:9.2f}{cells['cpu']:8.2f}{cells['peak'] / 1e6:9.0f}"
                f"{cells['sum']:14.6g}  {norms}",
                flush=True,
            )


if __name__ == "__main__":
    main()
