"""Scores of models: of predicted texts (loss, perplexity, bits per byte), of encoders, and of vision models."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from pydantic import BaseModel

from mhmoe_ray.runs import metrics


class Score(BaseModel):
    """Score of a model's predictions of a text, as sums over its tokens; scores add up with `+`."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the predicted tokens, except unknown tokens."""
    unknown: int = 0
    """Number of predicted unknown tokens, which stand for any text."""

    def __add__(self, addend: Self) -> "Score":
        return Score(**{name: value + getattr(addend, name) for name, value in self})

    @property
    def loss(self) -> float:
        """Mean loss in nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float | None:
        """Perplexity; None if it is larger than any float."""
        return metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte, comparable between tokenizers; None without bytes or with unknown tokens."""
        if self.unknown or not self.text_bytes:
            return None
        return self.nats / math.log(2) / self.text_bytes

    def figures(self) -> dict[str, float | None]:
        """Return the loss, perplexity, bits per byte and sizes of the text, for reports and JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }


class FigureTable(NamedTuple):
    """Table of an evaluation's results; the first column has names, the others have numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()
    """Lines of text below the table."""


class EncoderLossScore(BaseModel):
    """Mean of one loss of an encoder over held-out samples."""

    loss: float
    targets: int
    """Number of predicted patches, tokens or pairs."""
    is_text: bool
    """True if the loss is the cross-entropy of tokens, which has a perplexity."""

    @property
    def perplexity(self) -> float | None:
        """Perplexity of predicted tokens; None for other losses, and beyond any float."""
        return metrics.perplexity(self.loss) if self.is_text else None


class ImageValue(BaseModel):
    """Mean losses of an encoder on hidden tokens of captions, with and without images, in nats per token."""

    pairs: int
    """Number of captions; each image has at most `families.encoder.evaluate.meter.CAPTIONS_PER_IMAGE`."""
    tokens: int
    own_image: float
    other_image: float
    """Loss with the image of another caption, drawn at random with the run's seed."""
    no_image: float

    def figures(self) -> dict[str, float]:
        """Return the losses, and how much the caption's own image lowers them."""
        return {
            **self.model_dump(),
            "over_other_image": self.other_image - self.own_image,
            "over_no_image": self.no_image - self.own_image,
        }

    def texts(self) -> list[str]:
        """Return the losses, the differences and the counts as text."""
        losses = [f"{loss:.4f}" for loss in (self.own_image, self.other_image, self.no_image)]
        differences = [f"{loss - self.own_image:+.4f}" for loss in (self.other_image, self.no_image)]
        return [*losses, *differences, f"{self.pairs:,}", f"{self.tokens:,}"]


class Recall(BaseModel):
    """Shares of queries with a right candidate among the first 1, 5 and 10."""

    at_1: float
    at_5: float
    at_10: float


class RetrievalScore(BaseModel):
    """Score of the retrieval of captions by images, and of images by captions."""

    images: int
    captions: int
    image_to_text: Recall
    text_to_image: Recall

    def texts(self) -> list[str]:
        """Return all counts and shares as text, in their order."""
        shares = [f"{share:.1%}" for recall in (self.image_to_text, self.text_to_image) for _, share in recall]
        return [f"{self.images:,}", f"{self.captions:,}", *shares]


class LanguageRetrieval(BaseModel):
    """Scores of retrieval by a model and its baseline, on the same images and captions."""

    model: RetrievalScore
    baseline: RetrievalScore | None
    """Score of the nearest training images in pixels (`families/images/nearest.py`); None without training data."""


class RetrievalFigures(LanguageRetrieval):
    """Scores of retrieval among all pairs of image and caption of a domain."""

    languages: dict[str, LanguageRetrieval] = {}
    """Scores by language; empty unless there are several."""


class CaptionScore(BaseModel):
    """Score of the captions that a model writes for images (`families/encoder/evaluate/captions.py`)."""

    images: int
    bleu: float
    cider: float
    """CIDEr-D, from 0 to 10."""
    exact: float
    """Share of captions with exactly the words of a right caption."""


class CaptionFigures(BaseModel):
    """Scores of the captions that a model and its baseline give the same images."""

    model: CaptionScore
    baseline: CaptionScore | None
    """Captions of the nearest training images in pixels; None without training data."""
    examples: list[tuple[str, str]]
    """Right and written captions of the first images."""

    def table(self, name: str) -> FigureTable:
        """Return the scores of the captions of domain `name`, with the examples below."""
        rows = [
            [label, f"{score.images:,}", f"{score.bleu:.1f}", f"{score.cider:.3f}", f"{score.exact:.1%}"]
            for label, score in ((f"captions of {name}", self.model), ("  nearest pixels", self.baseline))
            if score is not None
        ]
        lines = [f"  {reference}: {caption}" for reference, caption in self.examples]
        return FigureTable(["", "images", "BLEU-4", "CIDEr-D", "exactly right"], rows, lines)


class AnswerScore(BaseModel):
    """Score of answers to questions, or of the truth of sentences."""

    samples: int
    accuracy: float
    """VQAv2's official accuracy of answers, or the share of sentences whose truth is right."""
    consistency: float | None
    """Share of sentences that are right for all their pairs of images; None for questions."""


class AnswerFigures(BaseModel):
    """Scores of a model and of its baselines on the same questions or sentences."""

    model: AnswerScore
    blank: AnswerScore
    """Score of the model without seeing the images."""
    language: AnswerScore | None
    """Score of the most frequent training answer to each text; None without training data."""
    nearest_image: AnswerScore | None
    """Score of the answer of the nearest training image with the same text; None without training data."""

    def table(self, name: str) -> FigureTable:
        """Return the scores of domain `name`."""
        scores = {
            f"answers of {name}": self.model,
            "  without the image": self.blank,
            "  language alone": self.language,
            "  nearest pixels": self.nearest_image,
        }
        rows = [
            [label, f"{s.accuracy:.1%}", "-" if s.consistency is None else f"{s.consistency:.1%}", f"{s.samples:,}"]
            for label, s in scores.items()
            if s is not None
        ]
        return FigureTable(["", "accuracy", "consistency", "samples"], rows)


class ProbeScore(BaseModel):
    """Accuracy of a linear probe that classifies images (`families/encoder/evaluate/probe.py`)."""

    training_images: int
    images: int
    classes: int
    accuracy: float
    baseline: float
    """Accuracy of the nearest training image in pixels."""
    largest_class: float
    """Share of images of the training images' most frequent class."""

    def texts(self) -> list[str]:
        """Return the shares and the counts as text."""
        shares = [f"{share:.1%}" for share in (self.accuracy, self.baseline, self.largest_class)]
        return [*shares, *(f"{count:,}" for count in (self.classes, self.images, self.training_images))]


class FamilyFigures(BaseModel, ABC):
    """Results of an evaluation that only one family of models has."""

    @abstractmethod
    def tables(self) -> list[FigureTable]:
        """Return the results as tables."""

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
    """Results of the evaluation of an encoder; mappings are by domain of pairs, except `losses`."""

    losses: dict[str, EncoderLossScore]
    """Losses of all training objectives by `RunSpec.loss_names`, for held-out samples only."""
    image_values: dict[str, ImageValue]
    retrieval: dict[str, RetrievalFigures] = {}
    captions: dict[str, CaptionFigures] = {}
    answers: dict[str, AnswerFigures] = {}
    classes: dict[str, ProbeScore] = {}
    training_images: int | None = None
    """Number of images that the baseline searches; None without a baseline."""

    def texts(self) -> list[str]:
        return [f"{name}={score.loss:.4f}" for name, score in self.losses.items()]

    def derived(self) -> dict[str, dict[str, Any]]:
        return {"image_values": {name: value.figures() for name, value in self.image_values.items()}}

    def quality(self) -> dict[str, float]:
        values = {}
        for domain, retrieval in self.retrieval.items():
            values[f"{domain}, R@10 of captions"] = retrieval.model.image_to_text.at_10
            values[f"{domain}, R@10 of images"] = retrieval.model.text_to_image.at_10
        for domain, captions in self.captions.items():
            values[f"{domain}, BLEU-4"], values[f"{domain}, CIDEr-D"] = captions.model.bleu, captions.model.cider
        values |= {f"{domain}, accuracy": answers.model.accuracy for domain, answers in self.answers.items()}
        values |= {f"{domain}, accuracy of the probe": score.accuracy for domain, score in self.classes.items()}
        return values

    def tables(self) -> list[FigureTable]:
        tables = []
        if self.losses:
            rows = []
            for name, score in self.losses.items():
                perplexity = f"{score.perplexity:.2f}" if score.perplexity else "-"
                rows.append([name, f"{score.loss:.4f}", perplexity, f"{score.targets:,}"])
            tables.append(FigureTable(["", "loss", "perplexity", "targets"], rows))
        if self.classes:
            columns = ["linear probe", "nearest pixels", "largest class", "classes", "images", "trained on"]
            rows = [[name, *score.texts()] for name, score in self.classes.items()]
            tables.append(FigureTable(["classes of", *columns], rows))
        if self.image_values:
            columns = ["own image", "another", "none", "over another", "over none", "pairs", "tokens"]
            rows = [[name, *value.texts()] for name, value in self.image_values.items()]
            tables.append(FigureTable(["hidden tokens of", *columns], rows))
        if self.retrieval:
            ranks = [f"{kind} R@{rank}" for kind in ("name", "image") for rank in (1, 5, 10)]
            tables.append(FigureTable(["retrieval in", "images", "captions", *ranks], self._retrieval_rows()))
        tables += [figures.table(name) for name, figures in self.answers.items()]
        return tables + [figures.table(name) for name, figures in self.captions.items()]

    def _retrieval_rows(self) -> list[list[str]]:
        """Return the rows of each domain and of its captions' languages, each followed by the baseline's, if any."""
        rows = []
        for domain, figures in self.retrieval.items():
            entries = [(domain, figures), *((f"  {name}", entry) for name, entry in figures.languages.items())]
            for label, entry in entries:
                rows.append([label, *entry.model.texts()])
                if entry.baseline is not None:
                    rows.append(["  nearest pixels", *entry.baseline.texts()])
        return rows


class AccuracyFigures(BaseModel):
    """Accuracy of a vision model on a classification task."""

    images: int
    classes: int
    """Number of different classes of the evaluated images."""
    top_1: float
    top_5: float
    baseline: float | None
    """Accuracy of the nearest training image in pixels (`families/images/nearest.py`); None without training data."""
    largest_class: float | None
    """Share of images of the training images' most frequent class; None without training data."""
    training_images: int | None = None
    """Number of images that the baseline searches; None without training data."""


class ObjectPrecision(BaseModel):
    """Average precision of detected objects, from 0 to 1 (`families/vision/evaluate/objects.py`)."""

    box_ap: float
    """Mean over overlaps (intersection over union) from 0.5 to 0.95."""
    box_ap50: float
    box_ap75: float
    mask_ap: float | None
    """Precision of masks, like `box_ap`; None without masks."""
    mask_ap50: float | None
    any_class_box_ap50: float
    """Precision at overlap 0.5 without classes; overlapping boxes of an image count once, with their highest score."""


class ObjectFigures(BaseModel):
    """Results of a vision model on a detection task."""

    images: int
    objects: int
    precision: ObjectPrecision


class VisionFigures(FamilyFigures):
    """Results of the evaluation of a vision model; classes and objects are by name of the task."""

    losses: dict[str, float]
    """Mean of each loss over images, by `RunSpec.loss_names`."""
    classes: dict[str, AccuracyFigures] = {}
    objects: dict[str, ObjectFigures] = {}

    def texts(self) -> list[str]:
        return [
            *(f"{name} top_1={figures.top_1:.4f}" for name, figures in self.classes.items()),
            *(f"{name} box_ap={figures.precision.box_ap:.4f}" for name, figures in self.objects.items()),
        ]

    def quality(self) -> dict[str, float]:
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

    def tables(self) -> list[FigureTable]:
        tables = [FigureTable(["", "loss"], [[name, f"{loss:.4f}"] for name, loss in self.losses.items()])]
        if self.classes:
            columns = ["classes of", "top 1", "top 5", "nearest pixels", "largest class", "classes", "images"]
            rows = []
            for name, score in self.classes.items():
                shares = (score.top_1, score.top_5, score.baseline, score.largest_class)
                texts = ["-" if share is None else f"{share:.1%}" for share in shares]
                rows.append([name, *texts, f"{score.classes:,}", f"{score.images:,}"])
            tables.append(FigureTable(columns, rows))
        if self.objects:
            columns = ["objects of", "box AP", "AP50", "AP75", "mask AP", "AP50", "any class AP50", "objects", "images"]
            rows = []
            for name, task in self.objects.items():
                texts = ["-" if value is None else f"{value:.3f}" for _, value in task.precision]
                rows.append([name, *texts, f"{task.objects:,}", f"{task.images:,}"])
            tables.append(FigureTable(columns, rows))
        return tables
