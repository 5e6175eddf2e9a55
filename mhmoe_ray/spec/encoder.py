"""The `model.encoder` section, which makes a model an encoder of images and texts."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mhmoe_ray.spec.base import ImageSide, Section, TokenCount, Width


class EncoderSpec(Section):
    """A multiway encoder of images and texts instead of a decoder (BEiT-3, arXiv 2208.10442).

    Each layer has norms, projections and a feed-forward layer for patches of images, and others for tokens of texts.
    Attention is over all patches and tokens of a sample, and the experts of a layer serve both.
    """

    image_size: ImageSide
    """Height and width of an image in pixels, as the model reads it."""
    patch_size: ImageSide
    """Height and width of a patch in pixels."""
    text_positions: TokenCount
    """Number of learned positions of a text in tokens; at least data.seq_len."""
    image_positions: TokenCount | None = None
    """Number of learned positions of an image; by default one for each patch, and one for the image as a whole."""
    image_targets: Literal["pixels", "codebook"] = "pixels"
    """Targets that the model predicts for hidden patches. pixels: their pixels, normalized by their mean and standard
    deviation (MAE, arXiv 2111.06377). codebook: the index of the closest entry in a codebook, which `data prepare`
    makes by k-means of patches. This codebook is not the tokenizer of BEiT v2, which needs a trained teacher."""
    codebook_size: TokenCount = Field(default=8192, ge=2)
    """Number of entries of the codebook, for image_targets codebook."""
    d_match: Width | None = None
    """Width of the vectors that objective `contrastive` compares; by default the model has no head for it."""
    answers: TokenCount | None = Field(default=None, ge=2)
    """Number of answers from which objective `answer` chooses: the most frequent ones of the training data. By default
    the model has no head for it. VQAv2 is trained with 3,129 answers."""
    compares: bool = False
    """If true, the model has a head for objective `compare`."""
    experts: Literal["beside", "replace"] = "beside"
    """Position of the experts in their layers. beside: their output is added to that of the feed-forward layers.
    replace: they take the place of the feed-forward layers."""
    routers: Literal["shared", "per_modality"] = "shared"
    """Routers of a layer with experts. shared: one for patches and tokens. per_modality: one for each of the two."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size ({self.patch_size})")
        if self.image_positions is not None and self.image_positions < self.patches + 1:
            raise ValueError(
                f"image_positions is {self.image_positions}, but an image has {self.patches} patches and a position of "
                f"its own: raise it to {self.patches + 1}, or patch_size"
            )
        if self.image_targets == "pixels" and self.changed_key("codebook_size"):
            raise ValueError("image_targets is pixels, so codebook_size would be ignored")
        return self

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.patches_per_side**2

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2

    @property
    def image_tokens(self) -> int:
        """Number of positions of an image: one for each patch, and one for the image as a whole."""
        return self.patches + 1

    @property
    def target_values(self) -> int:
        """Number of values computed for a hidden patch: its pixels, or the logits of a codebook."""
        return self.patch_values if self.image_targets == "pixels" else self.codebook_size
