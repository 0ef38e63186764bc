"""A run's weights in formats that other programs read."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from heterodox.core.config import Config
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path, exists, replacing
from heterodox.model import GPT
from heterodox.run.load import TrainedRun, load_run
from heterodox.run.sparse_file import write_sparse

Format = Literal["safetensors", "gpt2", "sparse"]
FORMATS: tuple[str, ...] = get_args(Format)


def export_run(path: PathLike, form: str, out: PathLike, checkpoint: str | None = None) -> Path:
    """Write the run's model to `out`.

    - `safetensors`: one file of weights under heterodox's names, the resolved recipe in its metadata.
    - `gpt2`: a folder that `transformers.GPT2LMHeadModel.from_pretrained` opens, with the same logits, and
      `AutoTokenizer.from_pretrained` with the same tokens.
    - `sparse`: one file of masks and of the weights that they leave; see `sparse_file.py`.
    """
    if form not in FORMATS:
        raise RecipeError(f"there is no export format {form!r}; known: {', '.join(FORMATS)}")
    path, out = as_path(path), as_path(out)
    if exists(out):
        raise CheckpointError(f"{out} already exists; give another --out")
    run = load_run(path, checkpoint)
    if form == "gpt2":
        _refuse_what_gpt2_lacks(run.recipe.model)
    write = {"gpt2": _write_gpt2, "safetensors": _write_safetensors, "sparse": write_sparse}[form]
    try:
        with replacing(out, folder=form == "gpt2") as temporary:
            write(run, temporary)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from None
    return out


def _refuse_what_gpt2_lacks(config: Config) -> None:
    """Raise `RecipeError` where the forward pass is not GPT-2's; how errors travel backwards does not matter."""
    if not isinstance(config, GPT.Config):
        name = config.model_dump()["name"]
        raise RecipeError(f"format gpt2 is for model gpt, this run's is {name}; use safetensors")
    plain = GPT.Config()
    foreign = ("attention", "mlp_top_k", "residual_top_k", "vq_codes", "subspace_rank", "residual_gates")
    on = [f"{key} {getattr(config, key)}" for key in foreign if getattr(config, key) != getattr(plain, key)]
    if on:
        raise RecipeError(f"GPT-2 has nothing like the model's {', '.join(on)}; export it as safetensors")


def _write_safetensors(run: TrainedRun, file: Path) -> None:
    metadata = {"recipe": json.dumps(run.recipe.dump()), "step": str(run.step)}
    save_file(_weights(run), file, metadata)


def _write_gpt2(run: TrainedRun, folder: Path) -> None:
    config = run.recipe.model
    assert isinstance(run.model, GPT)
    save_file(_as_gpt2(_weights(run)), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_gpt2_config(config, run.model), indent=1) + "\n")
    text = run.tokenizer.huggingface()
    if text is None:  # a tokenizer from outside: not under a name that AutoTokenizer would open as another one
        (folder / "heterodox_tokenizer.json").write_text(run.tokenizer.dumps(), encoding="utf-8")
        return
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _weights(run: TrainedRun) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in run.model.state_dict().items()}


def _as_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under GPT-2's names: q, k, v side by side, matrices transposed, absent biases zero."""
    renamed: dict[str, Tensor] = {
        "transformer.wte.weight": weights["tok_emb.weight"],
        "transformer.wpe.weight": weights["pos_emb.weight"],
        "lm_head.weight": weights["head.weight"],
    }

    def bias(source: str) -> Tensor:
        weight = weights[f"{source}.weight"]
        return weights.get(f"{source}.bias", weight.new_zeros(weight.shape[0]))

    def norm(source: str, target: str) -> None:
        renamed[f"{target}.weight"] = weights[f"{source}.weight"]
        renamed[f"{target}.bias"] = bias(source)

    def linear(sources: list[str], target: str) -> None:
        matrix = torch.cat([weights[f"{source}.weight"] for source in sources])
        renamed[f"{target}.weight"] = matrix.T.contiguous()
        renamed[f"{target}.bias"] = torch.cat([bias(source) for source in sources])

    norm("ln_f", "transformer.ln_f")
    for index in range(sum(name.endswith("attn.q.weight") for name in weights)):
        here, there = f"blocks.{index}", f"transformer.h.{index}"
        norm(f"{here}.ln1", f"{there}.ln_1")
        norm(f"{here}.ln2", f"{there}.ln_2")
        linear([f"{here}.attn.{part}" for part in "qkv"], f"{there}.attn.c_attn")
        linear([f"{here}.attn.o"], f"{there}.attn.c_proj")
        linear([f"{here}.mlp.fc"], f"{there}.mlp.c_fc")
        linear([f"{here}.mlp.proj"], f"{there}.mlp.c_proj")
    return renamed


def _gpt2_config(config: GPT.Config, model: GPT) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu",
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "n_inner": config.mlp_ratio * config.width,
        "n_positions": config.context,
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
