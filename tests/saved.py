"""What runs left in their folders, compared to the bit."""

from torch import Tensor

from heterodox.conformance.suite import require_same_bits, tensors, timeless

__all__ = ["assert_same_bits", "tensors", "timeless"]


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that both hold the same tensors, more than ten of them, bit for bit."""
    assert len(a) > 10
    require_same_bits(a, b, "the two runs")
