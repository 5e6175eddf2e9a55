"""Base class of all sections of a spec: unknown keys are errors, numbers are finite, instances are immutable."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from mhmoe_ray.storage import Location, ObjectPath, location

Precision = Literal["float32", "bfloat16"]

# Sizes have upper bounds of about ten times the largest published ones or more. A plan within them takes seconds, and
# the number of bytes of a weight fits into 64 bits.
_LAYERS, _WIDTH, _TOKENS, _STEPS = (Field(le=limit) for limit in (10_000, 2_000_000, 100_000_000, 1_000_000_000))
LayerCount = Annotated[PositiveInt, _LAYERS]
HeadCount = Annotated[PositiveInt, Field(le=10_000)]
ExpertCount = Annotated[PositiveInt, Field(le=10_000_000)]
Width = Annotated[PositiveInt, _WIDTH]
ImageSide = Annotated[PositiveInt, Field(le=32_768)]
TokenCount = Annotated[PositiveInt, _TOKENS]
SampleCount = Annotated[PositiveInt, Field(le=1_000_000)]
WorkerCount = Annotated[PositiveInt, Field(le=100_000)]
StepCount = Annotated[PositiveInt, _STEPS]
# These sizes may also be 0.
OptionalLayerCount = Annotated[NonNegativeInt, _LAYERS]
OptionalWidth = Annotated[NonNegativeInt, _WIDTH]
OptionalTokenCount = Annotated[NonNegativeInt, _TOKENS]
OptionalStepCount = Annotated[NonNegativeInt, _STEPS]


def _parse_location(value: Any) -> Location:
    if not isinstance(value, str | Path | ObjectPath):
        raise ValueError("it must be a path, s3://bucket/folder or gs://bucket/folder")
    return location(value)


def _explain_names(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            "use a short name of only lower-case letters, digits and dashes, without a dash first"
        ) from None


NAME_LENGTH = 41
RUN_NAME = rf"^[a-z0-9][a-z0-9-]{{0,{NAME_LENGTH - 1}}}$"
RunName = Annotated[str, Field(pattern=RUN_NAME), WrapValidator(_explain_names)]
SweepName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,20}$"), WrapValidator(_explain_names)]
StoragePath = Annotated[Location, PlainValidator(_parse_location), PlainSerializer(str)]


class Section(BaseModel):
    """Base class of all sections of a spec."""

    # The docstring below a field becomes its description in the JSON schemas.
    # A key that cannot be a Python name, such as `from`, is the alias of a field.
    # Some keys may be infinite, and tasks get specs as JSON. By default pydantic writes null for an infinite number.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )

    def changed_key(self, *names: str) -> str | None:
        """Return the first of these fields whose value is not its default, if any.

        The spec in a run directory names every key, so only another value than the default counts as set by the user.
        """
        fields = type(self).model_fields
        return next((name for name in names if getattr(self, name) != fields[name].default), None)


def section_keys(section: type[BaseModel]) -> list[str]:
    """Return the keys of a section as a spec file spells them: a field's alias if it has one, else its name."""
    return [field.alias or name for name, field in section.model_fields.items()]


def unmeasured(*names: str) -> BeforeValidator:
    """Return a validator that refuses names of GPU techniques until they have been measured on a GPU."""

    def refuse(value: Any) -> Any:
        if value in names:
            raise ValueError(f"{value} is not offered until it has been measured on a GPU: leave this key out")
        return value

    return BeforeValidator(refuse)
