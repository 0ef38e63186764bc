"""Every switch of the model: by name the options that turn it on in a GPT of width 16 (and, for tests, 8)."""

from typing import Any

SWITCHES: dict[str, dict[str, Any]] = {
    "softmax_fused": {"softmax_backward": "fused"},
    "softmax_centred": {"softmax_backward": "centred"},
    "sigmoid_neg_log_n": {"attention": "sigmoid"},
    "sigmoid_neg_log_row": {"attention": "sigmoid", "sigmoid_bias": "neg_log_row"},
    "sigmoid_zero": {"attention": "sigmoid", "sigmoid_bias": "zero"},
    "sigmoid_learned": {"attention": "sigmoid", "sigmoid_bias": "learned"},
    "straight_through_sigmoid": {"attention": "sigmoid", "straight_through_sigmoid": True},
    "straight_through_gelu": {"straight_through_gelu": True},
    "norm_straight_through": {"norm_backward": "straight_through"},
    "norm_center_scale": {"norm_backward": "center_scale"},
    "norm_projected": {"norm_backward": "projected"},
    "mlp_top_k": {"mlp_top_k": 6},
    "residual_top_k": {"residual_top_k": 5},
    "vq_codes": {"vq_codes": 32},
    "subspace_rank": {"subspace_rank": 6},
    "residual_gates": {"residual_gates": True},
    "frozen_embeddings": {"frozen_embeddings": True},
}
ALL_AT_ONCE: dict[str, Any] = {
    "attention": "sigmoid",
    "sigmoid_bias": "learned",
    "straight_through_sigmoid": True,
    "straight_through_gelu": True,
    "norm_backward": "center_scale",
    "mlp_top_k": 12,
    "residual_top_k": 7,
    "vq_codes": 32,
    "subspace_rank": 6,
    "residual_gates": True,
    "frozen_embeddings": True,
}
"""As many switches as go together."""
INEXACT = {
    "straight_through_sigmoid", "straight_through_gelu", "norm_straight_through", "norm_center_scale", "vq_codes",
}  # fmt: skip
"""Those under which autograd's gradient is not the derivative of the loss."""
CASES = SWITCHES | {"all_at_once": ALL_AT_ONCE}
