"""The `start` section: the model that a run starts from, instead of random weights."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mhmoe_ray.spec.base import Section


class StartSpec(Section):
    """Model that a run starts from. Its weights become the checkpoint of step 0, and training goes on from there."""

    from_: str | list[str] = Field(alias="from", min_length=1)
    """Model to start from: a run (its id, the first characters of its id, or its path; RUN@STEP names a checkpoint),
    the folder of a checkpoint, a folder in Hugging Face's layout, or hf:ORGANIZATION/NAME. For `how: mix` it is a list
    of models. In a sweep, sweep:VARIANT names another run of the sweep with the same seed."""
    how: Literal["copy", "upcycle", "mix"] = "copy"
    """Way in which the run gets its weights. copy: they are copied unchanged. upcycle: a dense model gets experts, or a
    sparse mixture becomes MH-MoE; the logits stay the same. Experts are copies of the dense feed-forward layer; with
    several heads or `moe.d_shared`, this layer becomes the shared expert instead. mix: feed-forward layers of several
    models become the experts, and all other weights are averaged (Branch-Train-MiX)."""
    optimizer: bool = False
    """If true, the optimizer's moments and its number of updates are copied too, as for a branch of a run."""
    order: Literal["new", "continue"] = "new"
    """Order of the samples. new: that of a new run. continue: each domain begins after the last sample that the earlier
    run read, so that no sample is repeated or left out."""

    new_experts: dict[str, str] = Field(default_factory=dict)
    """For each new expert of router `domain`, the earlier model's expert that it is copied from, by name; by default it
    is the mean of all old ones. Experts that `model.moe.domains` does not name are left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.how == "mix" and len(self.sources) < 2:
            raise ValueError("how: mix needs a list of at least two models in `from`")
        if self.how != "mix" and len(self.sources) > 1:
            raise ValueError(f"how: {self.how} takes one model, but `from` lists {len(self.sources)}")
        if self.optimizer and self.how != "copy":
            raise ValueError(f"optimizer: moments fit copied weights only, and how is {self.how}: remove optimizer")
        if self.new_experts and self.how != "copy":
            raise ValueError(f"new_experts are for how: copy, and how is {self.how}: remove new_experts")
        if self.order == "continue" and self.how == "mix":
            raise ValueError("order: continue goes on with the order of one run, and how: mix has several: remove it")
        return self

    @property
    def sources(self) -> list[str]:
        return [self.from_] if isinstance(self.from_, str) else self.from_

    def with_sources(self, sources: list[str]) -> Self:
        """Return the section with other models to start from."""
        return self.model_copy(update={"from_": sources[0] if isinstance(self.from_, str) else sources})
