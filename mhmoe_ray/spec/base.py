"""Base class of all spec sections: unknown keys are errors, numbers are finite, instances are immutable."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class of all sections of a spec."""

    # The docstring below a field becomes its description in the JSON schemas.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
