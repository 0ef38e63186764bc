"""A run's weights in formats that other programs read."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from heterodox.app.load import TrainedRun, load_run
from heterodox.app.recipe import Recipe, check
from heterodox.app.session import build_model, choose_device
from heterodox.core.errors import CheckpointError, CorpusError, RecipeError
from heterodox.core.files import PathLike, as_path, exists, parse_json, reading, replacing
from heterodox.core.protocols import LanguageModel
from heterodox.core.slot import Config
from heterodox.core.state import restore
from heterodox.data.tokenizers import Tokenizer, parse
from heterodox.model import GPT
from heterodox.model.sparse_inference import remove_dead_units

# A sparse model in one file: a bit for every place, a value for every connection.
#
# A safetensors file. For each masked matrix `name` there are `name.bits` (row by row, eight places a byte, the first in
# the highest bit) and `name.values` (those of the connections, row by row); for each MLP that has lost hidden units,
# `mlp.units`, a bit for each unit, and its matrices, masked or not, are narrower by those. All else is as in a dense
# file. The metadata hold the recipe, the tokenizer and the step.


FORMAT = "heterodox-sparse-1"


@dataclass
class SparseModel:
    """What a sparse file holds; `alive` are the hidden units that each MLP has left, by its name."""

    recipe: Recipe
    tokenizer: Tokenizer
    model: LanguageModel
    masks: dict[str, Tensor]
    alive: dict[str, Tensor]
    step: int


def write_sparse(run: TrainedRun, path: Path) -> None:
    """Write the run's model. Raises `RecipeError` for a run without masks."""
    masks = run.learner_state.get("update", {}).get("masks")
    if not masks:
        raise RecipeError(
            f"{run.folder.path} was trained with update {run.recipe.update.name}, which has no masks; "
            "export it as safetensors"
        )
    model, masks = copy.deepcopy(run.model).cpu(), {name: mask.cpu().clone() for name, mask in masks.items()}
    alive = remove_dead_units(model, masks)
    tensors: dict[str, Tensor] = {}
    for name, whole in model.state_dict().items():
        weight = _narrow(name, whole, alive)
        if name not in masks:
            tensors[name] = weight.contiguous()
            continue
        mask = _narrow(name, masks[name], alive)
        tensors[f"{name}.bits"], tensors[f"{name}.values"] = _pack(mask), weight[mask]
    tensors |= {f"{name}.units": _pack(units) for name, units in alive.items() if not bool(units.all())}
    facts = {
        "format": FORMAT,
        "recipe": json.dumps(run.recipe.dump()),
        "tokenizer": run.tokenizer.dumps(),
        "step": str(run.step),
        "summary": json.dumps(_summary(model, masks, alive)),
    }
    save_file(tensors, path, facts)


def read_sparse(path: PathLike, device: str = "cpu") -> SparseModel:
    """The model in a sparse file, its matrices as wide as the recipe has them.

    Raises `CheckpointError` if it is no such file, or a damaged one.
    """
    path = as_path(path)
    try:
        with reading(path), safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping: it cannot be iterated)
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no sparse model: its format is {facts.get('format')!r}, expected {FORMAT!r}")
    try:
        return _assemble(facts, tensors, device)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, RecipeError, CorpusError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}, {error}") from None


def _assemble(facts: Mapping[str, str], tensors: Mapping[str, Tensor], device: str) -> SparseModel:
    recipe, tokenizer = check(parse_json(facts["recipe"])), parse(facts["tokenizer"])
    model = build_model(recipe, tokenizer.vocab_size, choose_device(device))
    state = dict(model.state_dict())
    alive = {
        name.removesuffix(".units"): _unpack(bits, (state[f"{name.removesuffix('.units')}.fc.weight"].shape[0],))
        for name, bits in tensors.items()
        if name.endswith(".units")
    }
    weights = {name: _widen(name, tensor, alive, state[name]) for name, tensor in tensors.items() if name in state}
    masks: dict[str, Tensor] = {}
    for name in state.keys() - weights.keys():
        if f"{name}.bits" in tensors:
            weights[name], masks[name] = _unfold(name, tensors, alive, state[name])
    restore(state, weights, "weight")
    return SparseModel(recipe, tokenizer, model.eval(), masks, alive, int(facts["step"]))


def describe_sparse(path: PathLike) -> dict[str, Any]:
    """Bytes, connections and dead units of the sparse file at `path`, and the bytes of the weights in dense form."""
    path = as_path(path)
    with safe_open(path, framework="pt") as file:
        summary = json.loads(file.metadata()["summary"])
    return {"bytes": path.stat().st_size} | summary


def _summary(model: LanguageModel, masks: dict[str, Tensor], alive: dict[str, Tensor]) -> dict[str, int]:
    return {
        "dense_bytes": sum(weight.nbytes for weight in model.state_dict().values()),
        "connections": sum(int(mask.sum()) for mask in masks.values()),
        "places": sum(mask.numel() for mask in masks.values()),
        "dead_units": sum(int((~units).sum()) for units in alive.values()),
        "units": sum(units.numel() for units in alive.values()),
    }


def _narrow(name: str, tensor: Tensor, alive: dict[str, Tensor]) -> Tensor:
    """The matrix or bias without the rows or columns of dead units."""
    mlp, _, layer = name.rpartition(".")[0].rpartition(".")
    if mlp not in alive or layer not in ("fc", "proj") or name.endswith("proj.bias"):
        return tensor
    return tensor[alive[mlp]] if layer == "fc" else tensor[:, alive[mlp]]


def _widen(name: str, tensor: Tensor, alive: dict[str, Tensor], like: Tensor) -> Tensor:
    """The whole matrix or bias, zero where dead units were."""
    if tensor.shape == like.shape:
        return tensor
    places = _narrow(name, torch.arange(like.numel()).view(like.shape), alive)
    whole = torch.zeros(like.numel(), dtype=tensor.dtype)
    whole[places] = tensor
    return whole.view(like.shape)


def _unfold(
    name: str, tensors: Mapping[str, Tensor], alive: dict[str, Tensor], like: Tensor
) -> tuple[Tensor, Bool[Tensor, "rows columns"]]:
    """The whole matrix and its mask, zero where dead units were."""
    mask = _unpack(tensors[f"{name}.bits"], _narrow(name, torch.empty(like.shape), alive).shape)
    weight = torch.zeros(mask.shape, dtype=like.dtype)
    weight[mask] = tensors[f"{name}.values"]
    return _widen(name, weight, alive, like), _widen(name, mask, alive, like)


def _pack(bits: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    return torch.from_numpy(np.packbits(bits.flatten().numpy()))


def _unpack(packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...]) -> Bool[Tensor, "*shape"]:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool)).view(shape)


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
