"""Base class of all spec sections: unknown keys are errors, numbers are finite, instances are immutable."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class of all sections of a spec."""

    # The docstring below a field becomes its description in the JSON schemas.
    # Keys that are no Python names, such as `from`, are aliases.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )


def section_keys(section: type[BaseModel]) -> list[str]:
    """Return the keys of a section as a spec writes them."""
    return [field.alias or name for name, field in section.model_fields.items()]
