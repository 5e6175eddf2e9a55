"""Samples of an encoder: decoded crops of images, tokens of texts, and the masks of both, part by part.

Images and texts are in the order of the parts. Crops and masks depend on the seed, the part and the sample's position
in the training alone, not on the number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.order.rows import RowOrder, held_out_numbers
from mhmoe_ray.data.shards.columns import padding_token
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.data.shards.rows import IMAGE, RowReader
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.families.encoder.data.masking import block_mask, hide_tokens, text_mask
from mhmoe_ray.families.images.crops import Crop, centre_crop, random_crop, read_crop
from mhmoe_ray.spec import MicroBatchPart, RunSpec


class Pairs(NamedTuple):
    """Held-out pairs of one domain: captions with their images."""

    domain: str
    tokens: np.ndarray
    """Tokens of the captions as they are stored, with padding, (pairs, T)."""
    images: list[bytes]
    languages: list[str | None]
    """Language of each caption; None if its record does not name it."""


class SampleMaker:
    """Maker of an encoder's samples from stored rows: it decodes and crops images, and hides patches and tokens."""

    def __init__(self, spec: RunSpec, token_bytes: int) -> None:
        encoder = spec.model.encoder
        assert encoder is not None
        self._spec, self._encoder, self._padding = spec, encoder, padding_token(token_bytes)

    def make(
        self, part: MicroBatchPart, tokens: np.ndarray, images: Sequence[bytes], labels: Sequence[str], *, crops: bool
    ) -> EncoderSamples:
        """Return samples of a part from stored tokens, (samples, T), and encoded images, empty where a sample has none.

        With the seed of the run, a sample's label determines its masks and, if `crops` is true, its random crop.
        """
        seed, encoder, sections = self._spec.seed, self._encoder, self._spec.train.masking
        is_pair, is_masked = len(part.columns) > 1, part.traits.hides
        image_share = sections.pair_image if is_pair else sections.image
        text_share = sections.pair_text if is_pair else sections.text
        side = encoder.patches_per_side
        image_labels = labels if "image" in part.columns else []
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
        )

    def _crop_function(self, label: str) -> Callable[[int, int], Crop]:
        return partial(random_crop, images=self._spec.data.images, seed=self._spec.seed, label=label)


class EncoderTrainingSamples:
    """Random access to the samples of an encoder's training, by the number of the micro-batch."""

    def __init__(self, spec: RunSpec) -> None:
        self._order = RowOrder(spec)
        self._maker = SampleMaker(spec, self._order.token_bytes)

    @staticmethod
    def open_cached(spec: RunSpec) -> "EncoderTrainingSamples":
        """Return the training samples of a spec, which a process caches for its next Ray tasks."""
        return _open_samples(spec.model_dump_json())

    def read(self, micro_batch: int) -> EncoderSamples:
        """Return the samples of all parts of a micro-batch."""
        return EncoderSamples.join(
            [
                self._maker.make(part.part, *self._read_rows(part.positions), part.labels, crops=True)
                for part in self._order.parts(micro_batch)
            ]
        )

    def _read_rows(self, positions: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
        tokens: np.ndarray | None = None
        images = [b""] * len(positions)
        for group in self._order.locate(positions):
            domain_tokens, domain_images = group.reader.read(group.numbers)
            if tokens is None:
                tokens = np.empty((len(positions), domain_tokens.shape[1]), domain_tokens.dtype)
            tokens[group.indices] = domain_tokens
            for index, image in zip(group.indices, domain_images, strict=True):
                images[index] = image
        assert tokens is not None
        return tokens, images


# The argument is JSON, since a cache needs hashable arguments and a spec is not hashable.
@lru_cache(maxsize=2)
def _open_samples(spec_json: str) -> EncoderTrainingSamples:
    return EncoderTrainingSamples(RunSpec.model_validate_json(spec_json))


class HeldOutSamples:
    """Held-out samples of one part, decoded on access, with the same masks and the largest central square each time."""

    def __init__(self, maker: SampleMaker, reader: RowReader, numbers: np.ndarray) -> None:
        """Set up access to rows `numbers` of all held-out rows, without reading them."""
        self._maker, self._reader, self._numbers = maker, reader, numbers

    @property
    def sample_count(self) -> int:
        """The number of held-out samples of the part."""
        return len(self._numbers)

    def rows(self, part: MicroBatchPart, start: int, stop: int) -> EncoderSamples:
        """Return samples `start` to `stop` - 1, with the columns and the masks of `part`."""
        # The reader cannot read zero rows. For an empty range the first row is read, which gives the shape and dtype of
        # the tokens.
        tokens = self._reader.read_tokens(self._numbers[start:stop] if start < stop else self._numbers[:1])
        tokens, images = tokens[: stop - start], self._reader.read_values(IMAGE, self._numbers[start:stop])
        labels = [f"validation {part.name} {number}" for number in range(start, stop)]
        return self._maker.make(part, tokens, images, labels, crops=False)


def encoder_validation_samples(spec: RunSpec, manifest: DataManifest) -> Mapping[str, HeldOutSamples]:
    """Return the held-out samples of each part of micro-batches that has any, by the name of the part."""
    reader = RowReader(spec.data.prepared, manifest.validation, manifest.token_bytes)
    maker = SampleMaker(spec, manifest.token_bytes)
    return {name: HeldOutSamples(maker, reader, rows) for name, rows in held_out_numbers(spec, manifest).items()}


def held_out_pairs(spec: RunSpec, manifest: DataManifest) -> Iterator[Pairs]:
    """Yield the held-out pairs of an image and a caption in a run's prepared data, domain by domain."""
    reader = RowReader(spec.data.prepared, manifest.validation, manifest.token_bytes)
    for name, rows in _held_out_pair_rows(spec, manifest):
        yield Pairs(name, *reader.read(rows), [None] * len(rows))


def held_out_captions(spec: RunSpec, manifest: DataManifest) -> np.ndarray:
    """Return the stored tokens of the held-out captions, (captions, T), without reading their images."""
    reader = RowReader(spec.data.prepared, manifest.validation, manifest.token_bytes)
    tokens = [reader.read_tokens(rows) for _, rows in _held_out_pair_rows(spec, manifest)]
    return np.concatenate([np.empty((0, spec.data.seq_len), np.int64), *tokens])


def _held_out_pair_rows(spec: RunSpec, manifest: DataManifest) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each domain with held-out pairs, and the numbers of their rows."""
    first_row = 0
    for name, domain in manifest.domains.items():
        rows = np.arange(first_row, first_row := first_row + domain.validation_samples)
        if len(rows) and len(spec.data.sources[source_of(name)].sample_columns) > 1:
            yield name, rows
