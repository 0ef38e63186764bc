"""Latency and size of a sparse model on a CPU, layer by layer and as a whole, beside its dense form.

    python bench/sparse_inference.py --width 512 --sparsity 0.9
    python bench/sparse_inference.py --file runs/rigl_90-seed0/sparse.safetensors

Without a file the weights are random: how long a product takes hardly depends on their values.
A pass is over one token (`--rows` for more), without a key–value cache; medians of alternating passes.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from heterodox.app.export import read_sparse
from heterodox.core.comm import Solo
from heterodox.core.protocols import LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.model import GPT
from heterodox.model.sparse_inference import LayerTiming, for_inference
from heterodox.update import Sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=None)
    parser.add_argument("--sparsity", type=float, default=0.9)
    sizes = {"layers": 4, "heads": 4, "width": 128, "context": 64, "vocab": 65}
    for name, default in (sizes | {"rows": 1, "threads": 1, "rounds": 300}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, masks, alive = drawn(options) if options.file is None else opened(options.file)
    fast, timings = for_inference(model, masks, alive, rows=options.rows, rounds=options.rounds)
    report(timings)
    tokens = torch.zeros(1, options.rows, dtype=torch.long)
    dense, chosen = alternate(model, fast, tokens, options.rounds)
    whole = statistics.median(a / b for a, b in zip(chosen, dense, strict=True))
    print(f"model, {options.rows} token(s): dense {1e6 * statistics.median(dense):.0f} µs, ", end="")
    print(f"chosen {1e6 * statistics.median(chosen):.0f} µs, ratio {whole:.2f}")
    dense_bytes = sum(t.nbytes for t in model.state_dict().values())
    small, what = promised(masks, dense_bytes), "bits and values, by count,"
    if options.file is not None:
        small, what = options.file.stat().st_size, "the file"
    print(f"weights: dense {dense_bytes / 1e6:.2f} MB, {what} {small / 1e6:.2f} MB ({small / dense_bytes:.2f})")


def promised(masks: dict[str, torch.Tensor], dense_bytes: int) -> int:
    """A bit for every place and four bytes for every connection, and what is not masked."""
    places, connections = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    return dense_bytes - 4 * places + 4 * connections + places // 8


def drawn(options: argparse.Namespace) -> tuple[LanguageModel, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A random model under a random mask."""
    sizes = {key: getattr(options, key) for key in ("layers", "heads", "width", "context")}
    model = GPT.Config(**sizes).build(options.vocab, Streams(0)).eval()
    update = Sparse.Config.model_validate({"topology": "static", "sparsity": options.sparsity}).build()
    update.connect(Services(model, Streams(0), Solo()))
    update.begin(dict(model.named_parameters()))
    return model, update.masks.views, {}


def opened(path: Path) -> tuple[LanguageModel, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    found = read_sparse(path)
    return found.model, found.masks, found.alive


def report(timings: list[LayerTiming]) -> None:
    print(f"{'layer':28} {'shape':>12} {'density':>8} {'dense µs':>9} {'CSR µs':>9}  chosen")
    for timing in timings:
        sparse = "none" if timing.sparse_seconds is None else f"{1e6 * timing.sparse_seconds:.1f}"
        shape = f"{timing.shape[0]}×{timing.shape[1]}"
        chosen = "CSR" if timing.sparse_wins else "dense"
        print(f"{timing.name:28} {shape:>12} {timing.density:8.3f} {1e6 * timing.dense_seconds:9.1f} ", end="")
        print(f"{sparse:>9}  {chosen}")


@torch.no_grad()
def alternate(a: torch.nn.Module, b: torch.nn.Module, tokens: torch.Tensor, rounds: int) -> list[list[float]]:
    """Seconds of each pass of both models."""
    times: list[list[float]] = [[], []]
    for number in range(rounds + 10):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            (a, b)[which](tokens)
            if number >= 10:
                times[which].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
