"""The base of every recipe section."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen record that refuses unknown keys. A part's own `Config` has `name: Literal[...]` and `build(...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def refusals(self, recipe: "Config") -> list[str]:
        """Reasons why this part cannot run within `recipe` (the whole one); none by default."""
        return []
