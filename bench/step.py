"""One training step of the same size, ours against transformers' GPT-2 and litgpt's GPT.

Each side does what its users do: forward, cross-entropy, backward, clip to 1.0, fused AdamW. Ours goes through
`learner.step`, which is what `heterodox train` calls.

    python bench/step.py
    python bench/step.py --layers 8 --width 256 --batch 16
"""

import argparse
import statistics
from importlib.metadata import version

import litgpt
import torch
import torch.nn.functional as F
import transformers
from timing import Step, alternate, options, random_batches, ratio
from torch import Tensor, nn

from heterodox.app.recipe import load_recipe
from heterodox.app.session import build_learner, build_model
from heterodox.core.comm import Solo
from heterodox.core.types import Batch

OURS = "heterodox"
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0


def main() -> None:
    arguments = options("One training step: heterodox, litgpt, transformers.").parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {}
    models[OURS], ours = heterodox_step(arguments)
    models["litgpt"] = litgpt_model(arguments)
    models["transformers"] = transformers_model(arguments, "gelu_new")
    models["transformers, exact GELU"] = transformers_model(arguments, "gelu")
    steps = {OURS: ours} | {name: plain_step(model) for name, model in models.items() if name != OURS}
    batches = random_batches(arguments.vocab, arguments.batch, arguments.context)
    times = alternate(steps, batches, arguments.rounds, arguments.warmup)

    print(f"torch {torch.__version__}, litgpt {version('litgpt')}, transformers {version('transformers')}")
    print(f"{arguments.layers} layers, {arguments.heads} heads, width {arguments.width}, ", end="")
    print(f"context {arguments.context}, batch {arguments.batch}, vocabulary {arguments.vocab}")
    print(f"{arguments.threads} threads, {arguments.rounds} rounds after {arguments.warmup}\n")
    print(f"{'':26}{'parameters':>12}{'median ms':>12}{'quartiles':>18}{'ours / theirs':>16}")
    for name, model in models.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        size = sum(p.numel() for p in model.parameters())
        quotient = "" if name == OURS else f"{ratio(times[OURS], times[name]):.2f}"
        print(f"{name:26}{size:12,}{median:12.1f}{f'{low:.1f} to {high:.1f}':>18}{quotient:>16}")


def heterodox_step(arguments: argparse.Namespace) -> tuple[nn.Module, Step]:
    """Our backprop, through the learner that a recipe builds."""
    sizes = {key: getattr(arguments, key) for key in ("layers", "heads", "width", "context")}
    update = {"name": "adamw", "lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": WEIGHT_DECAY}
    learner = {"name": "gradient", "clip": CLIP}
    recipe = load_recipe({"credit": "backprop", "model": sizes, "update": update, "learner": learner})
    model = build_model(recipe, arguments.vocab, "cpu")
    model.train()
    return model, build_learner(recipe, model, Solo()).step


def litgpt_model(arguments: argparse.Namespace) -> nn.Module:
    """litgpt's GPT with Pythia's parts: LayerNorm, a plain MLP, a quarter of each head rotated."""
    config = litgpt.Config(
        n_layer=arguments.layers,
        n_head=arguments.heads,
        n_embd=arguments.width,
        block_size=arguments.context,
        vocab_size=arguments.vocab,
        padded_vocab_size=arguments.vocab,
        rotary_percentage=0.25,
        parallel_residual=False,
        bias=False,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        intermediate_size=4 * arguments.width,
    )
    return litgpt.GPT(config).train()


def transformers_model(arguments: argparse.Namespace, activation: str) -> nn.Module:
    """GPT-2 as the library makes it, but without dropout and cache. Its own GELU is the tanh form `gelu_new`."""
    config = transformers.GPT2Config(
        n_layer=arguments.layers,
        n_head=arguments.heads,
        n_embd=arguments.width,
        n_positions=arguments.context,
        vocab_size=arguments.vocab,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config).train()


def plain_step(model: nn.Module) -> Step:
    """The ordinary training loop's body."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def step(batch: Batch) -> None:
        answer = model(batch.inputs)
        logits = answer if isinstance(answer, Tensor) else answer.logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
