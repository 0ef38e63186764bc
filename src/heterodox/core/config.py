"""The base of every recipe section."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

MOST = 1 << 63
"""The largest whole number that an option can be."""


class Config(BaseModel):
    """A frozen record that refuses unknown keys. A part's own `Config` has `name: Literal[...]` and `build(...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_only_where_they_are_meant(cls, data: Any) -> Any:
        """`top_k: true` would otherwise be read as 1, and a number of hundreds of digits overflow later."""
        for key, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, int) and abs(value) > MOST:
                raise ValueError(f"{key} is a number of more than {len(str(MOST)) - 1} digits, too large for anything")
            field = cls.model_fields.get(key)
            kinds = {field.annotation, *get_args(field.annotation)} if field else set()
            if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{key} is {str(value).lower()}, expected a number")
        return data

    def in_float32(self) -> list[str]:
        """Return what this part computes in float32 under `run.precision: bfloat16`; nothing by default."""
        return []

    def refusals(self, recipe: "Config") -> list[str]:
        """Reasons why this part cannot run within `recipe` (the whole one); none by default."""
        return []
