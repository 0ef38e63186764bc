"""A study folder as `heterodox compare` leaves it: 5 recipes, 3 seeds, one diverged run, hostile samples."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

SEEDS = (0, 1, 2)
FINAL = {  # validation loss that each recipe tends to, in nats per token
    "backprop": 1.86,
    "sign_symmetry": 1.97,
    "feedback_alignment": 2.29,
    "direct_feedback": 2.52,
    "head_only": 2.64,
}
ORIGINS = {
    "backprop": "backprop",
    "sign_symmetry": "feedback",
    "feedback_alignment": "feedback",
    "direct_feedback": "feedback",
    "head_only": "frozen",
}
COSINE = {"backprop": 1.0, "sign_symmetry": 0.82, "feedback_alignment": 0.44, "direct_feedback": 0.21}
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \x00\x1b[31m\ud800"
STEPS, TOKENS_PER_STEP, UNIGRAM, FLOOR = 2000, 1024, 3.31, 1.42
DIAGNOSIS = "The loss became NaN at step 1240; the gradient norm had grown to 4.1e6."
DIVERGED = ("sign_symmetry", 2)


def parameters(blocks: int = 4, width: int = 64) -> dict[str, list[int]]:
    shapes = {"tok_emb.weight": [256, width], "pos_emb.weight": [64, width]}
    for i in range(blocks):
        shapes |= {f"blocks.{i}.ln_1.weight": [width], f"blocks.{i}.ln_2.weight": [width]}
        shapes |= {f"blocks.{i}.attn.{part}.weight": [width, width] for part in "qkvo"}
        shapes |= {f"blocks.{i}.mlp.fc.weight": [4 * width, width]}
        shapes |= {f"blocks.{i}.mlp.proj.weight": [width, 4 * width]}
    return shapes | {"ln_f.weight": [width], "head.weight": [256, width]}


def write_study(out: Path, recipes: tuple[str, ...] = tuple(FINAL), seeds: tuple[int, ...] = SEEDS) -> Path:
    """Write the whole study to `out` and return it."""
    rows = [write_run(out / "runs" / name / f"seed-{seed}", name, seed) for name in recipes for seed in seeds]
    results = {
        "format": 1,
        "baseline": "backprop",
        "recipes": [{"name": name, "description": f"What {name} does, in a line."} for name in recipes],
        "seeds": list(seeds),
        "corpus": {
            "name": "stdlib", "documents": 1042, "bytes": 9_812_345,
            "tokens": {"train": 8_800_000, "meta": 400_000, "val": 300_000, "test": 300_000},
            "vocab_size": 256, "sha256": "7c3f" * 16, "floor": FLOOR,
        },
        "versions": {"heterodox": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "device": "cpu",
        "created": "2026-01-15T09:30:00+00:00",
        "command": "heterodox compare --seeds 3 --out study",
        "runs": rows,
        "table": [],
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results))
    return out


def write_run(folder: Path, recipe: str, seed: int) -> dict[str, Any]:
    """Write one run folder and return its summary row."""
    folder.mkdir(parents=True)
    random_ = random.Random(f"{recipe}/{seed}")
    diverged = (recipe, seed) == DIVERGED
    config = {
        "name": recipe, "seed": seed, "data": {"name": "stdlib", "tokenizer": "byte"},
        "model": {"blocks": 4, "width": 64, "heads": 4, "context": 64},
        "credit": {"name": recipe} | ({"feedback": "orthogonal"} if "feedback" in recipe else {}),
        "update": {"name": "adamw", "lr": 1e-3 if recipe == "backprop" else 3e-4}, "steps": STEPS,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "manifest.json").write_text(json.dumps(_manifest(recipe)))
    rows = _metrics(recipe, seed, random_, diverged)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = [row for row in rows if row["kind"] == "eval"][-1]
    size = sum(math.prod(shape) for shape in parameters().values())
    loss = None if diverged else last["val_loss"]
    summary = {
        "recipe": recipe, "seed": seed, "steps": last["step"], "tokens": last["tokens"], "meta_tokens": 0,
        "flops": last["flops"], "seconds": last["seconds"], "wall_seconds": last["seconds"] * 1.1,
        "val_loss": loss, "val_bits_per_byte": None if diverged else loss / math.log(2),
        "test_loss": None if diverged else loss + 0.012,
        "activation_bytes": 1_900_000 if recipe in ("direct_feedback", "head_only") else 7_340_000,
        "peak_memory_bytes": 412_000_000, "parameters": size, "active_parameters": size,
        "corpus_sha256": "7c3f" * 16, "status": "diverged" if diverged else "finished",
        "message": DIAGNOSIS if diverged else None,
        "unigram_loss": UNIGRAM, "floor_loss": FLOOR, "run": f"runs/{recipe}/seed-{seed}",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    samples = [
        {"prompt": "def ", "text": f"def parse(self, {recipe}):\n    return self.args", "temperature": 0.8},
        {"prompt": "import ", "text": HOSTILE, "temperature": 1.0},
    ]
    (folder / "samples.json").write_text(json.dumps(samples))
    return summary


def _manifest(recipe: str) -> dict[str, Any]:
    entries = {}
    for name, shape in parameters().items():
        local = recipe != "backprop" and ("emb" in name or "ln_" in name)
        origin = "exact" if name.startswith("head") else "frozen" if local else ORIGINS[recipe]
        entries[name] = {"origin": origin, "shape": shape, "size": math.prod(shape)}
    return {"parameters": entries, "credit": recipe, "update": "adamw"}


def _metrics(recipe: str, seed: int, random_: random.Random, diverged: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    final = FINAL[recipe] + 0.03 * (seed - 1) + random_.gauss(0, 0.006)
    cheap = 0.7 if recipe in ("direct_feedback", "head_only") else 1.0
    for step in range(0, STEPS + 1, 50):
        tokens = step * TOKENS_PER_STEP
        cost = {"step": step, "tokens": tokens, "flops": int(tokens * 1.6e6 * cheap)}
        cost |= {"seconds": step * 0.021 * cheap * (1 + 0.05 * seed)}
        loss = final + (5.62 - final) * math.exp(-((step / 180) ** 0.7)) + random_.gauss(0, 0.01)
        train = {"kind": "train", "meta_tokens": 0, "loss": loss, "grad_norm": 1.2, "lr": 1e-3}
        rows.append(train | cost)
        if diverged and step > 1200:
            rows.append({"kind": "eval", "val_loss": None, "val_bits_per_byte": None} | cost)
            break
        rows.append({"kind": "eval", "val_loss": loss, "val_bits_per_byte": loss / math.log(2)} | cost)
        if step % 200 == 0 and recipe in COSINE:
            rows.append({"kind": "probe", "step": step, "alignment": _alignment(recipe, step, random_)})
    return rows


def _alignment(recipe: str, step: int, random_: random.Random) -> dict[str, dict[str, float | None]]:
    probes = {}
    for depth, (name, shape) in enumerate(parameters().items()):
        if len(shape) == 1:
            probes[name] = {"cosine": None, "norm_ratio": None, "sign_agreement": None}
            continue
        cosine = COSINE[recipe] * (1 - math.exp(-(step + 40) / 500)) * (0.5 + depth / 60)
        cosine = 1.0 if name.startswith("head") or recipe == "backprop" else cosine + random_.gauss(0, 0.05)
        cosine = max(-1.0, min(1.0, cosine))
        ratio = 1.0 if cosine == 1.0 else math.exp(random_.gauss(-0.5 + depth / 40, 0.4))
        probes[name] = {
            "cosine": cosine,
            "norm_ratio": ratio,
            "sign_agreement": 1 - math.acos(cosine) / math.pi,
        }
    return probes
