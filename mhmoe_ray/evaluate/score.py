"""Scores: of a text that a model predicted (loss, perplexity, bits per byte), of an encoder, and of a vision model."""

import math
from typing import Self

from pydantic import BaseModel

from mhmoe_ray.runs import metrics


class Score(BaseModel):
    """Score of a model's predictions of a text, as sums over its tokens. Scores of several texts add up with `+`."""

    nats: float = 0.0
    """Sum of the tokens' losses, in nats."""
    tokens: int = 0
    """Number of predicted tokens."""
    text_bytes: int = 0
    """Number of UTF-8 bytes of the predicted tokens, except unknown tokens."""
    unknown: int = 0
    """Number of predicted tokens that are the unknown token, which stands for any text."""

    def __add__(self, addend: Self) -> "Score":
        return Score(
            nats=self.nats + addend.nats,
            tokens=self.tokens + addend.tokens,
            text_bytes=self.text_bytes + addend.text_bytes,
            unknown=self.unknown + addend.unknown,
        )

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the tokens, e to the power of `loss`; None if it is larger than any float."""
        return metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte of text, which is comparable between tokenizers; the loss per token is not.

        It is None if the text has no bytes, or if it has unknown tokens, whose bytes are not known.
        """
        if self.unknown or not self.text_bytes:
            return None
        return self.nats / math.log(2) / self.text_bytes

    def figures(self) -> dict[str, float | None]:
        """Return the figures that reports and JSON outputs show."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }


class EncoderLossScore(BaseModel):
    """Mean of one of the losses over held-out samples."""

    loss: float
    targets: int
    """Number of hidden patches, hidden tokens or pairs."""
    is_text: bool
    """True if it is the cross-entropy of tokens, which has a perplexity."""

    @property
    def perplexity(self) -> float | None:
        """Perplexity of hidden tokens; None for other losses, and if it is larger than any float."""
        return metrics.perplexity(self.loss) if self.is_text else None


class ImageValue(BaseModel):
    """Mean losses of the hidden tokens of captions, in nats."""

    pairs: int
    """Number of captions; of an image, a few at most (`evaluate.encoder.CAPTIONS_PER_IMAGE`)."""
    tokens: int
    """Number of hidden tokens."""
    own_image: float
    """Loss with the image that belongs to the caption."""
    other_image: float
    """Loss with another image, of another caption, drawn by the run's seed."""
    no_image: float
    """Loss of the caption alone."""

    def figures(self) -> dict[str, float]:
        """Return the losses, and the value of the image over another one and over none."""
        return {
            **self.model_dump(),
            "over_other_image": self.other_image - self.own_image,
            "over_no_image": self.no_image - self.own_image,
        }


class Recall(BaseModel):
    """Share of queries whose best fitting candidate is among the first 1, 5 and 10."""

    at_1: float
    at_5: float
    at_10: float


class RetrievalScore(BaseModel):
    """Score of a retrieval among images and captions."""

    images: int
    captions: int
    image_to_text: Recall
    """Recall of captions that fit an image."""
    text_to_image: Recall
    """Recall of images that fit a caption."""


class LanguageRetrieval(BaseModel):
    """Retrieval by a model and by its baseline, on the same images and captions."""

    model: RetrievalScore
    baseline: RetrievalScore | None
    """Score of the nearest training images in pixels (`evaluate.nearest`); None if the data of the training is gone."""


class RetrievalFigures(LanguageRetrieval):
    """Retrieval among all pairs of a domain."""

    languages: dict[str, LanguageRetrieval] = {}
    """Retrieval among the captions of each language, if the captions are in several."""


class CaptionScore(BaseModel):
    """Score of captions of images (`evaluate.captions`)."""

    images: int
    bleu: float
    """BLEU-4, from 0 to 100."""
    cider: float
    """CIDEr-D, from 0 to 10."""
    exact: float
    """Share of captions whose words are exactly those of a right one."""


class CaptionFigures(BaseModel):
    """Captions by a model and by its baseline, of the same images."""

    model: CaptionScore
    baseline: CaptionScore | None
    """Score of the captions of the nearest training images in pixels; None if the data of the training is gone."""
    examples: list[tuple[str, str]]
    """Captions of the first images: a right one and that of the model."""


class ClassScore(BaseModel):
    """Accuracy of a linear probe (`evaluate.probe`)."""

    training_images: int
    images: int
    classes: int
    accuracy: float
    """Share of images whose class the probe names."""
    baseline: float
    """The same of the class of the nearest training image in pixels."""
    largest_class: float
    """Share of images of the class that most training images have."""


class EncoderFigures(BaseModel):
    """Figures of an encoder."""

    losses: dict[str, EncoderLossScore]
    """Losses of the parts of micro-batches, by the names in `RunSpec.loss_names`; only for held-out samples."""
    image_values: dict[str, ImageValue]
    """Value of the image by domain, for domains of pairs."""
    retrieval: dict[str, RetrievalFigures] = {}
    """Retrieval by domain of pairs, for a model with a head for matching."""
    captions: dict[str, CaptionFigures] = {}
    """Captions by domain of pairs, for a model that is trained on captions."""
    classes: dict[str, ClassScore] = {}
    """Linear probe by domain, if the request asks for one."""
    training_images: int | None = None
    """Number of training images among which the baseline of retrieval and captions looks for the nearest one; None
    without a baseline."""

    def quality(self) -> dict[str, float]:
        """Return accuracies, precisions and recalls by the names that reports show. More is better."""
        values = {}
        for domain, retrieval in self.retrieval.items():
            values[f"{domain}, R@10 of captions"] = retrieval.model.image_to_text.at_10
            values[f"{domain}, R@10 of images"] = retrieval.model.text_to_image.at_10
        for domain, captions in self.captions.items():
            values[f"{domain}, BLEU-4"], values[f"{domain}, CIDEr-D"] = captions.model.bleu, captions.model.cider
        values |= {f"{domain}, accuracy of the probe": score.accuracy for domain, score in self.classes.items()}
        return values


class AccuracyFigures(BaseModel):
    """Accuracy of a task of classification."""

    images: int
    classes: int
    """Number of classes of these images."""
    top_1: float
    """Share of images whose class has the highest score."""
    top_5: float
    """Share of images whose class is among the five with the highest scores."""
    baseline: float | None
    """Share of images whose class is that of the nearest training image in pixels (`evaluate.nearest`); None if the
    data of the training is gone."""
    largest_class: float | None
    """Share of images of the class that most training images have; None like `baseline`."""
    training_images: int | None = None
    """Number of training images among which the baseline looks for the nearest one; None like `baseline`."""


class ObjectPrecision(BaseModel):
    """Average precision of detected objects, from 0 to 1 (`evaluate.objects`)."""

    box_ap: float
    """Mean over overlaps from 0.5 to 0.95."""
    box_ap50: float
    box_ap75: float
    mask_ap: float | None
    """The same of masks; None if model or images have none."""
    mask_ap50: float | None
    any_class_box_ap50: float
    """Average precision of boxes at overlap 0.5, whatever their classes. Overlapping boxes of an image count once, with
    the highest of their scores."""


class ObjectFigures(BaseModel):
    """Figures of a task of detection."""

    images: int
    objects: int
    precision: ObjectPrecision


class VisionFigures(BaseModel):
    """Figures of a vision model."""

    losses: dict[str, float]
    """Mean over images of each loss, by the names in `RunSpec.loss_names`."""
    classes: dict[str, AccuracyFigures] = {}
    """Accuracy of each task of classification."""
    objects: dict[str, ObjectFigures] = {}
    """Average precision of each task of detection."""

    def quality(self) -> dict[str, float]:
        """Return accuracies, precisions and recalls by the names that reports show. More is better."""
        values = {}
        for task, accuracy in self.classes.items():
            values[f"{task}, top 1"], values[f"{task}, top 5"] = accuracy.top_1, accuracy.top_5
        for task, objects in self.objects.items():
            precision = objects.precision
            values[f"{task}, box AP"], values[f"{task}, box AP50"] = precision.box_ap, precision.box_ap50
            if precision.mask_ap is not None and precision.mask_ap50 is not None:
                values[f"{task}, mask AP"], values[f"{task}, mask AP50"] = precision.mask_ap, precision.mask_ap50
            values[f"{task}, box AP50 whatever the class"] = precision.any_class_box_ap50
        return values
