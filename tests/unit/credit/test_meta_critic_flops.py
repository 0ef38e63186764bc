"""MCL-DSUP's FLOPs, summed by hand, against PyTorch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.app.session import build_model
from heterodox.core.rng import Streams
from heterodox.objective import CrossEntropy
from tests.switches import ALL_AT_ONCE
from tests.tiny import tiny_batch, tiny_recipe

OPTIONS = {
    "defaults": {},
    "at each matrix": {"point": "output"},
    "pooled": {"target": "pooled"},
    "token": {"target": "token"},
    "shared": {"shared": True},
    "shared, pooled": {"shared": True, "target": "pooled"},
    "mlp": {"critic": "mlp"},
    "no linear path": {"linear": False},
    "low rank": {"structure": "low_rank"},
    "block": {"structure": "block", "block": 4},
    "elementwise": {"structure": "elementwise", "density": 0.05},
    "the source's": {"structure": "low_rank", "target": "pooled", "critic": "mlp", "linear": False},
    "one matrix": {"matrices": ["mlp.proj"]},
    "values": {"matrices": ["attn.v"]},
    "queries and fc": {"matrices": ["attn.q", "mlp.fc"]},
    "keys and o": {"matrices": ["attn.o", "attn.k"]},
    "no embeddings": {"embeddings": "frozen"},
    "regression": {"objective": "regression"},
    "phase 0": {"regression_steps": 1},
    "frozen": {"objective": "frozen"},
    "reuse": {"reuse_target": True},
    "one stage": {"layers_per_step": 1},
    "two stages": {"layers_per_step": 2},
    "one by one": {"suffix": "separate"},
    "joint": {"joint_every": 1},
    "narrow": {"local_width": 7, "target_width": 9},
    "some tokens": {"density": 0.25},
    "activations": {"hypothesis": "activations"},
    "activations at each matrix": {"hypothesis": "activations", "point": "output"},
    "activations, queries and fc": {"hypothesis": "activations", "matrices": ["attn.q", "mlp.fc"]},
    "activations, keys and o at each matrix": {
        "hypothesis": "activations", "point": "output", "matrices": ["attn.o", "attn.k"],
    },
    "activations, proj": {"hypothesis": "activations", "matrices": ["mlp.proj"], "embeddings": "frozen"},
    "transport": {"transport": "attention"},
    "transport to one stage": {"transport": "attention", "layers_per_step": 1, "hypothesis": "activations"},
    "transport of narrow G": {"transport": "attention", "target": "token", "target_width": 9},
    "activations after phase 0": {"hypothesis": "activations", "regression_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("switches", [{}, ALL_AT_ONCE], ids=["plain", "all switches"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_steps_cost_what_torch_counts(options, switches):
    if switches and options.get("layers_per_step") == 2:
        options = options | {"layers_per_step": 1}  # frozen embeddings are no stage, so two would be all
    recipe = tiny_recipe(credit={"name": "meta_critic"} | options, model=switches, run={"precision": "float64"})
    model = build_model(recipe, 8, "cpu")
    rule = recipe.credit.build(model, Streams(0))
    weights = torch.ones(4, dtype=torch.float64)
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            signal = rule.signal(model, tiny_batch(4, 16, 8), weights, CrossEntropy())
        assert signal.cost.flops == counter.get_total_flops() > 0
