"""What all ratings' sections have in common."""

import math

from pydantic import Field

from heterodox.core import config

KEEP = 0.7
"""The share that is kept by default."""


def num_drawn(batch_size: int, keep: float) -> int:
    """How many examples to draw so that the share `keep` of them is a batch."""
    return math.ceil(batch_size / keep)


class RatingConfig(config.Config):
    """A rating that keeps every example."""

    def drawn(self, batch_size: int) -> int:
        """How many examples to draw so that `batch_size` of them are learned from."""
        return batch_size


class FilterConfig(RatingConfig):
    """A rating that keeps the best `keep` of a batch drawn larger."""

    keep: float = Field(KEEP, gt=0, le=1, description="share of the examples drawn that is learned from, the best")

    def drawn(self, batch_size: int) -> int:
        return num_drawn(batch_size, self.keep)
