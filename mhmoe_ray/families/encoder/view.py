"""The lines and tables that commands show of encoders."""

from typing import TYPE_CHECKING

from mhmoe_ray.planner.view import FamilyView, FigureTable
from mhmoe_ray.spec import RunSpec

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.score import CaptionFigures, ClassScore, EncoderFigures, ImageValue, RetrievalFigures


class EncoderView(FamilyView):
    """View of encoders."""

    def summary(self, spec: RunSpec) -> dict[str, str]:
        encoder = spec.model.encoder
        assert encoder is not None
        targets = "pixels" if encoder.image_targets == "pixels" else f"a codebook of {encoder.codebook_size:,} entries"
        text = (
            f"images of {encoder.image_size} x {encoder.image_size} pixels in {encoder.patches} patches, which are "
            f"predicted as {targets}; texts of up to {spec.data.seq_len - 1} tokens"
        )
        if spec.model.moe is not None:
            routers = "one router" if encoder.routers == "shared" else "a router for each modality"
            position = "beside" if encoder.experts == "beside" else "in place of"
            text += f"; experts {position} the feed-forward layers, with {routers}"
        return {"encoder": text}

    def micro_batch(self, spec: RunSpec) -> str:
        return f"{spec.tokens_per_micro_batch:,} patches and tokens"

    def tables(self, figures: "EncoderFigures") -> list[FigureTable]:
        tables = []
        if figures.losses:
            rows = [
                [
                    name,
                    f"{score.loss:.4f}",
                    f"{score.perplexity:.2f}" if score.perplexity else "-",
                    f"{score.targets:,}",
                ]
                for name, score in figures.losses.items()
            ]
            tables.append(FigureTable(["", "loss", "perplexity", "targets"], rows))
        if figures.classes:
            tables.append(_class_table(figures.classes))
        if figures.image_values:
            tables.append(_image_value_table(figures.image_values))
        if figures.retrieval:
            columns = [
                "retrieval in",
                "images",
                "captions",
                *(f"{way} R@{rank}" for way in WAYS for rank in (1, 5, 10)),
            ]
            tables.append(FigureTable(columns, _retrieval_rows(figures.retrieval)))
        return tables + [_caption_table(name, scores) for name, scores in figures.captions.items()]


WAYS = ("name", "image")
"""Kind of result of each direction of retrieval: the name (caption) for an image, and the image for a name."""


def _class_table(scores: "dict[str, ClassScore]") -> FigureTable:
    columns = ["classes of", "linear probe", "nearest pixels", "largest class", "classes", "images", "trained on"]
    rows = [
        [
            name,
            *(f"{share:.1%}" for share in (score.accuracy, score.baseline, score.largest_class)),
            *(f"{count:,}" for count in (score.classes, score.images, score.training_images)),
        ]
        for name, score in scores.items()
    ]
    return FigureTable(columns, rows)


def _image_value_table(image_values: "dict[str, ImageValue]") -> FigureTable:
    """Return the losses of hidden caption tokens in nats per token."""
    columns = ["hidden tokens of", "own image", "another", "none", "over another", "over none", "pairs", "tokens"]
    rows = []
    for name, value in image_values.items():
        losses = (value.own_image, value.other_image, value.no_image)
        gains = (value.other_image - value.own_image, value.no_image - value.own_image)
        texts = [*(f"{loss:.4f}" for loss in losses), *(f"{gain:+.4f}" for gain in gains)]
        rows.append([name, *texts, f"{value.pairs:,}", f"{value.tokens:,}"])
    return FigureTable(columns, rows)


def _retrieval_rows(figures: "dict[str, RetrievalFigures]") -> list[list[str]]:
    """Return the rows of each domain and of its captions' languages, each followed by a row of the baseline, if any."""
    rows = []
    for domain, domain_figures in figures.items():
        for name, entry in {domain: domain_figures, **domain_figures.languages}.items():
            label = name if name == domain else f"  {name}"
            for row_label, score in ((label, entry.model), ("  nearest pixels", entry.baseline)):
                if score is not None:
                    recalls = (score.image_to_text, score.text_to_image)
                    shares = [f"{value:.1%}" for r in recalls for value in (r.at_1, r.at_5, r.at_10)]
                    rows.append([row_label, f"{score.images:,}", f"{score.captions:,}", *shares])
    return rows


def _caption_table(name: str, figures: "CaptionFigures") -> FigureTable:
    rows = [
        [label, f"{score.images:,}", f"{score.bleu:.1f}", f"{score.cider:.3f}", f"{score.exact:.1%}"]
        for label, score in ((f"captions of {name}", figures.model), ("  nearest pixels", figures.baseline))
        if score is not None
    ]
    lines = [f"  {reference}: {caption}" for reference, caption in figures.examples]
    return FigureTable(["", "images", "BLEU-4", "CIDEr-D", "exactly right"], rows, lines)
