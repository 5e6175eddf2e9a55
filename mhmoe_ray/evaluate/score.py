"""Scores of models: of predicted texts (loss, perplexity, bits per byte), of encoders, and of vision models."""

import math
from abc import ABC, abstractmethod
from typing import Any, Self

from pydantic import BaseModel

from mhmoe_ray.runs import metrics


class Score(BaseModel):
    """Score of a model's predictions of a text, as sums over its tokens; scores of several texts are added with `+`."""

    nats: float = 0.0
    """Sum of the tokens' losses, in nats."""
    tokens: int = 0
    """Number of predicted tokens."""
    text_bytes: int = 0
    """Number of UTF-8 bytes of the predicted tokens, except unknown tokens."""
    unknown: int = 0
    """Number of predicted tokens that are the tokenizer's unknown token, which stands for any text."""

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
        """Loss in bits per byte of text, which is comparable between tokenizers, unlike the loss per token.

        It is None if the text has no bytes, or if it has unknown tokens, whose bytes are not known.
        """
        if self.unknown or not self.text_bytes:
            return None
        return self.nats / math.log(2) / self.text_bytes

    def figures(self) -> dict[str, float | None]:
        """Return the loss, perplexity, bits per byte and sizes of the text, as reports and JSON outputs show them."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }


class EncoderLossScore(BaseModel):
    """Mean of one loss of an encoder over held-out samples."""

    loss: float
    targets: int
    """Number of predictions that the mean is over: hidden patches, hidden tokens or pairs."""
    is_text: bool
    """True if the loss is the cross-entropy of tokens, which has a perplexity."""

    @property
    def perplexity(self) -> float | None:
        """Perplexity of predicted tokens; None for losses of other kinds, and if it is larger than any float."""
        return metrics.perplexity(self.loss) if self.is_text else None


class ImageValue(BaseModel):
    """Mean losses of an encoder on hidden tokens of captions, with and without images, in nats per token."""

    pairs: int
    """Number of captions; each image has at most a few of them (`evaluate.encoder.CAPTIONS_PER_IMAGE`)."""
    tokens: int
    """Number of hidden tokens."""
    own_image: float
    """Loss with the image that belongs to the caption."""
    other_image: float
    """Loss with the image of another caption, which is drawn at random with the run's seed."""
    no_image: float
    """Loss of the caption alone, without an image."""

    def figures(self) -> dict[str, float]:
        """Return the losses, and how much lower the loss is with the caption's image than with another one or none."""
        return {
            **self.model_dump(),
            "over_other_image": self.other_image - self.own_image,
            "over_no_image": self.no_image - self.own_image,
        }


class Recall(BaseModel):
    """Shares of queries for which a right candidate is among the first 1, 5 and 10 candidates."""

    at_1: float
    at_5: float
    at_10: float


class RetrievalScore(BaseModel):
    """Score of the retrieval of captions by images, and of images by captions."""

    images: int
    captions: int
    image_to_text: Recall
    """Recall of the captions that belong to an image."""
    text_to_image: Recall
    """Recall of the images that belong to a caption."""


class LanguageRetrieval(BaseModel):
    """Scores of retrieval by a model and by its baseline, on the same images and captions."""

    model: RetrievalScore
    baseline: RetrievalScore | None
    """Score of retrieval by the nearest training images in pixels (`families/images/nearest.py`).

    It is None if the training data is gone.
    """


class RetrievalFigures(LanguageRetrieval):
    """Scores of retrieval among all pairs of image and caption of a domain."""

    languages: dict[str, LanguageRetrieval] = {}
    """Scores of retrieval among the captions of each language; empty unless there are several languages."""


class CaptionScore(BaseModel):
    """Score of the captions that a model writes for images (`evaluate.captions`)."""

    images: int
    bleu: float
    """BLEU-4, from 0 to 100."""
    cider: float
    """CIDEr-D, from 0 to 10."""
    exact: float
    """Share of captions whose words are exactly those of a right caption, from 0 to 1."""


class CaptionFigures(BaseModel):
    """Scores of the captions that a model and its baseline give the same images."""

    model: CaptionScore
    baseline: CaptionScore | None
    """Score of the captions of the nearest training images in pixels; None if the training data is gone."""
    examples: list[tuple[str, str]]
    """Captions of the first images: a right one, and the one that the model wrote."""


class ClassScore(BaseModel):
    """Accuracy of a linear probe that classifies images (`families/encoder/evaluate/probe.py`)."""

    training_images: int
    images: int
    classes: int
    accuracy: float
    """Share of images that the probe assigns to the right class."""
    baseline: float
    """Share of images whose nearest training image in pixels has the right class."""
    largest_class: float
    """Share of images that belong to the most frequent class of the training images."""


class FamilyFigures(BaseModel, ABC):
    """Results of an evaluation that only one family of models has."""

    @abstractmethod
    def quality(self) -> dict[str, float]:
        """Return the results under the names that reports show; a larger value is better."""

    @abstractmethod
    def texts(self) -> list[str]:
        """Return the main results as "NAME=VALUE"."""

    def derived(self) -> dict[str, dict[str, Any]]:
        """Return figures that follow from the stored ones, for JSON."""
        return {}


class EncoderFigures(FamilyFigures):
    """Results of the evaluation of an encoder."""

    losses: dict[str, EncoderLossScore]
    """Losses of all training objectives, by name (`RunSpec.loss_names`).

    Only held-out samples have losses. The mapping is empty for other data.
    """
    image_values: dict[str, ImageValue]
    """Losses on captions with and without their images, by domain of pairs."""
    retrieval: dict[str, RetrievalFigures] = {}
    """Scores of retrieval by domain of pairs, for a model with a head for matching."""
    captions: dict[str, CaptionFigures] = {}
    """Scores of captions by domain of pairs, for a model that is trained to write captions."""
    classes: dict[str, ClassScore] = {}
    """Accuracy of a linear probe by domain, if the request asks for a probe."""
    training_images: int | None = None
    """Number of training images among which the baseline of retrieval and captions finds the nearest one.

    It is None without a baseline.
    """

    def texts(self) -> list[str]:
        return [f"{name}={score.loss:.4f}" for name, score in self.losses.items()]

    def derived(self) -> dict[str, dict[str, Any]]:
        return {"image_values": {name: value.figures() for name, value in self.image_values.items()}}

    def quality(self) -> dict[str, float]:
        """Return recalls, scores of captions and accuracies under the names that reports show; larger is better."""
        values = {}
        for domain, retrieval in self.retrieval.items():
            values[f"{domain}, R@10 of captions"] = retrieval.model.image_to_text.at_10
            values[f"{domain}, R@10 of images"] = retrieval.model.text_to_image.at_10
        for domain, captions in self.captions.items():
            values[f"{domain}, BLEU-4"], values[f"{domain}, CIDEr-D"] = captions.model.bleu, captions.model.cider
        values |= {f"{domain}, accuracy of the probe": score.accuracy for domain, score in self.classes.items()}
        return values


class AccuracyFigures(BaseModel):
    """Accuracy of a vision model on a classification task."""

    images: int
    classes: int
    """Number of different classes that the evaluated images have."""
    top_1: float
    """Share of images whose right class has the highest score."""
    top_5: float
    """Share of images whose right class is among the five with the highest scores."""
    baseline: float | None
    """Share of images whose nearest training image in pixels has the right class (`families/images/nearest.py`).

    It is None if the training data is gone.
    """
    largest_class: float | None
    """Share of images that belong to the most frequent class of the training images; None if `baseline` is."""
    training_images: int | None = None
    """Number of training images among which the baseline finds the nearest one; None if `baseline` is."""


class ObjectPrecision(BaseModel):
    """Average precision of detected objects, from 0 to 1 (`families/vision/evaluate/objects.py`)."""

    box_ap: float
    """Average precision of boxes, as the mean over overlaps (intersection over union) from 0.5 to 0.95."""
    box_ap50: float
    box_ap75: float
    mask_ap: float | None
    """Average precision of masks, like `box_ap`; None if the model or the images have no masks."""
    mask_ap50: float | None
    any_class_box_ap50: float
    """Average precision of boxes at overlap 0.5 if their classes are ignored.

    Overlapping boxes of an image count once, with the highest of their scores.
    """


class ObjectFigures(BaseModel):
    """Results of a vision model on a detection task."""

    images: int
    objects: int
    precision: ObjectPrecision


class VisionFigures(FamilyFigures):
    """Results of the evaluation of a vision model."""

    losses: dict[str, float]
    """Mean of each loss over images, by the name of the loss (`RunSpec.loss_names`)."""
    classes: dict[str, AccuracyFigures] = {}
    """Accuracy of each classification task, by the name of the task."""
    objects: dict[str, ObjectFigures] = {}
    """Average precision of each detection task, by the name of the task."""

    def texts(self) -> list[str]:
        return [
            *(f"{name} top_1={figures.top_1:.4f}" for name, figures in self.classes.items()),
            *(f"{name} box_ap={figures.precision.box_ap:.4f}" for name, figures in self.objects.items()),
        ]

    def quality(self) -> dict[str, float]:
        """Return accuracies and precisions under the names that reports show; a larger value is better."""
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
