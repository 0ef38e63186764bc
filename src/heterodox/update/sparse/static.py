"""Static sparsity: a random mask that never changes.

The floor of every comparison: what the connections' number is worth, wherever they are.
"""

from typing import Literal

from heterodox.core import config
from heterodox.update.sparse.topology import Change, Sight, Topology


class Static(Topology):
    """A mask drawn once."""

    class Config(config.Config):
        name: Literal["static"] = "static"

        def build(self) -> "Static":
            return Static()

    def change(self, sight: Sight) -> Change | None:
        return None
