"""Samples of an encoder: decoded crops of images, tokens of texts, and the masks of both, part by part.

Images and texts are in the order of the parts. Crops and masks depend on the seed, the part and the sample's position
in the training alone, not on the number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.family import PartSampleMaker
from mhmoe_ray.data.images.annotations import Annotation, unpack
from mhmoe_ray.data.samples import held_out_reader
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE, SECOND_IMAGE, TOKENS, StoredColumns, padding_token
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.data.sources.answer_text import ANNOTATORS, normalized_answer
from mhmoe_ray.data.sources.questions import LABELS
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.families.encoder.data.masking import block_mask, hide_tokens, text_mask
from mhmoe_ray.families.images.crops import Crop, centre_crop, random_crop, read_crop
from mhmoe_ray.spec import MicroBatchPart, RunSpec


class Pairs(NamedTuple):
    """Held-out pairs of one domain: captions or questions with their images."""

    domain: str
    tokens: np.ndarray
    """Tokens of the captions as they are stored, with padding, (pairs, T)."""
    images: list[bytes]
    languages: list[str | None]
    """Language of each caption; None if its record does not name it."""
    second_images: Sequence[bytes] = ()
    """Second image of each sentence; empty unless there are any."""
    annotations: Sequence[Annotation] = ()
    """Answers to the questions, or the truth of the sentences; empty for captions."""

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of the pairs as stored samples, except their annotations."""
        return {TOKENS: self.tokens, IMAGE: self.images, SECOND_IMAGE: self.second_images}


class SampleMaker(PartSampleMaker):
    """Maker of an encoder's samples from stored rows: it decodes and crops images, and hides patches and tokens."""

    def __init__(self, spec: RunSpec, token_bytes: int, answers: Mapping[str, Sequence[str]] | None = None) -> None:
        """Create the maker; `answers` are those of each part of objective `answer`, by class."""
        encoder = spec.model.encoder
        assert encoder is not None
        self._spec, self._encoder, self._padding = spec, encoder, padding_token(token_bytes)
        self._classes = {
            part: {answer: number for number, answer in enumerate(names)} for part, names in (answers or {}).items()
        }
        labelled_columns = (SECOND_IMAGE, ANNOTATION) if any(part.traits.columns for part in spec.parts) else ()
        self.columns = (TOKENS, IMAGE, *labelled_columns)

    def make(
        self, part: MicroBatchPart, stored: StoredColumns, labels: Sequence[str], *, crops: bool
    ) -> EncoderSamples:
        """Return samples of a part; a label determines the masks and, if `crops` is true, the random crop."""
        tokens, images = np.asarray(stored[TOKENS]), stored[IMAGE]
        seed, encoder, sections = self._spec.seed, self._encoder, self._spec.train.masking
        is_pair, is_masked = len(part.columns) > 1, part.traits.hides
        image_share = sections.pair_image if is_pair else sections.image
        text_share = sections.pair_text if is_pair else sections.text
        side = encoder.patches_per_side
        image_labels = [*labels] if "image" in part.columns else []
        if part.pairs_per_sample == 2:
            tokens = np.repeat(tokens, 2, axis=0)
            images = [image for pair in zip(images, stored[SECOND_IMAGE], strict=True) for image in pair]
            image_labels = [label + suffix for label in labels for suffix in ("", " second")]
        pixels = [
            read_crop(content, encoder.image_size, self._crop_function(f"{label} crop") if crops else centre_crop)
            for content, label in zip(images, image_labels, strict=False)
        ]
        patch_hidden = [
            block_mask(side, side, image_share, seed, f"{label} image").ravel()
            if is_masked
            else np.zeros(side**2, bool)
            for label in image_labels
        ]
        texts = tokens if "text" in part.columns else tokens[:0]
        inputs, token_predicted = texts.copy(), np.zeros(texts.shape, bool)
        for number, row in enumerate(texts if is_masked else texts[:0]):
            # The start token is never hidden, so it is not counted.
            count = int((row != self._padding).sum()) - 1
            if count > 0:
                label, stretch = labels[number], slice(1, 1 + count)
                mask = text_mask(count, text_share, seed, f"{label} text")
                token_predicted[number, stretch] = mask
                inputs[number, stretch] = hide_tokens(
                    row[stretch], mask, self._spec.model.vocab_size, seed, f"{label} tokens"
                )
        if part.traits.writes:
            # A token is predicted at the position before it, and the end of a text at its last token. Nothing is
            # predicted at the last position of a row, because a text that fills its row may have been cut.
            token_predicted = texts != self._padding
            token_predicted[:, -1] = False
        size = encoder.image_size
        return EncoderSamples(
            np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8),
            np.stack(patch_hidden) if patch_hidden else np.empty((0, side**2), bool),
            texts,
            inputs,
            token_predicted,
            self._labels(part, stored.get(ANNOTATION, ())),
        )

    def _labels(self, part: MicroBatchPart, annotations: Sequence[bytes]) -> np.ndarray:
        """Return the labels of questions or sentences as in `EncoderSamples`; without annotations, all are -1."""
        labels = np.full((len(annotations) if part.traits.columns else 0, ANNOTATORS), -1, np.int64)
        for row, content in zip(labels, annotations, strict=False):
            annotation = unpack(content)
            if part.objective == "compare":
                row[0] = LABELS.index(annotation.class_name)
            else:
                classes = self._classes[part.name]
                row[:] = [classes.get(normalized_answer(answer), -1) for answer in annotation.answers]
        return labels

    def _crop_function(self, label: str) -> Callable[[int, int], Crop]:
        return partial(random_crop, images=self._spec.data.images, seed=self._spec.seed, label=label)


def held_out_pairs(spec: RunSpec, manifest: DataManifest) -> Iterator[Pairs]:
    """Yield the held-out pairs of an image and a caption in a run's prepared data, domain by domain."""
    reader = held_out_reader(spec.data.prepared, manifest, spec.cluster.shard_cache)
    for name, rows in _held_out_pair_rows(spec, manifest):
        columns = spec.data.sources[source_of(name)].sample_columns
        yield Pairs(
            name,
            reader.read(rows),
            reader.read_values(IMAGE, rows),
            [None] * len(rows),
            reader.read_values(SECOND_IMAGE, rows) if "second_image" in columns else (),
            [*map(unpack, reader.read_values(ANNOTATION, rows))] if "class" in columns else (),
        )


def held_out_captions(spec: RunSpec, manifest: DataManifest) -> np.ndarray:
    """Return the stored tokens of the held-out captions, (captions, T), without reading their images."""
    reader = held_out_reader(spec.data.prepared, manifest, spec.cluster.shard_cache)
    tokens = [reader.read(rows) for _, rows in _held_out_pair_rows(spec, manifest)]
    return np.concatenate([np.empty((0, spec.data.seq_len), np.int64), *tokens])


def _held_out_pair_rows(spec: RunSpec, manifest: DataManifest) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each domain with held-out pairs, and the numbers of their rows."""
    first_row = 0
    for name, domain in manifest.domains.items():
        rows = np.arange(first_row, first_row := first_row + domain.validation_samples)
        if len(rows) and len(spec.data.sources[source_of(name)].sample_columns) > 1:
            yield name, rows
