"""How much of each source a phase of the training reads."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section

Weight = Annotated[float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(gt=0, le=1e18)]
"""Both may be counts of tokens as well as fractions: only ratios count."""
Epochs = Annotated[float, Field(gt=0, le=1e6)]


class SourceMix(Section):
    """A source's part and how its subfolders share it; in a schedule, a key left out stays as it was."""

    weight: Weight | None = None
    alpha: float | None = Field(default=None, ge=0, le=1)
    """In the place of `shares`, where the source had some."""
    shares: dict[str, Share] | None = Field(default=None, min_length=1)
    """In the place of `alpha`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha is not None:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        return self

    def changed(self, by: "SourceMix") -> "SourceMix":
        """This mix with the other's keys in place of its own."""
        within = self if by.alpha is None and by.shares is None else by
        weight = self.weight if by.weight is None else by.weight
        return SourceMix(weight=weight, alpha=within.alpha, shares=within.shares)


class PhaseSpec(Section):
    from_step: PositiveInt
    """Optimizer steps done before it."""
    sources: dict[str, SourceMix] = Field(min_length=1)
    """What changes, by source."""
