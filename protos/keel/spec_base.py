"""What the sections of a RunSpec have in common: frozen, closed, with numbers that are bounded."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

ACROSS = "keel_across_fields"
"""Type of the complaints that `across` makes."""


def across(field: str, value: object, valid: str) -> PydanticCustomError:
    """A complaint about one field that only the sight of another one allows."""
    return PydanticCustomError(ACROSS, "{valid}", {"field": field, "value": value, "valid": valid})


class Section(BaseModel):
    """A section: an unknown key is an error; each field's docstring is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
