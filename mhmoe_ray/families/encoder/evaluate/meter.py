"""Evaluation of an encoder: its losses on held-out samples, and the value of an image for predicting its caption.

The value of the image is the difference that it makes to the loss on hidden tokens of captions, in nats per hidden
token. The same tokens are predicted with the caption's own image, with an image of another caption, and without one.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from mhmoe_ray.data.draws import seeded_hash
from mhmoe_ray.data.family import PartSamples
from mhmoe_ray.data.images.annotations import unpack
from mhmoe_ray.data.prepare.rows import token_rows
from mhmoe_ray.data.shards.columns import IMAGE, TOKENS, padding_token, token_bytes_for
from mhmoe_ray.data.sources import Document, FileReader, find_files
from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.answer import Progress
from mhmoe_ray.evaluate.measure import RouteCounter
from mhmoe_ray.evaluate.request import RoutingCounts
from mhmoe_ray.evaluate.score import EncoderLossScore, ImageValue
from mhmoe_ray.families.encoder.data.batches import BatchMaker, evaluated_samples
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.families.encoder.data.samples import Pairs, SampleMaker
from mhmoe_ray.families.encoder.evaluate.retrieval import Candidates
from mhmoe_ray.families.encoder.model import Encoded, Encoder
from mhmoe_ray.families.encoder.model.captions import write_captions
from mhmoe_ray.families.images.crops import read_crop
from mhmoe_ray.families.images.nearest import distinct_images
from mhmoe_ray.model.transfer import copy_to_device
from mhmoe_ray.spec import DataSpec, MicroBatchPart, RunSpec

CAPTIONS_PER_IMAGE = 5
"""Largest number of captions per image in the image's value and in counts of routes.

Most images of COCO have this many, but an image with captions in many languages can have hundreds.
"""


class EncoderMeter:
    """Evaluator that runs an encoder on one device. Images are cropped to the largest square at their centre."""

    def __init__(
        self,
        model: Encoder,
        spec: RunSpec,
        codebook: np.ndarray | None = None,
        *,
        use_bfloat16: bool,
        on_progress: Progress,
    ) -> None:
        self._model, self._spec, self._use_bfloat16, self._on_progress = model, spec, use_bfloat16, on_progress
        self._device = next(model.parameters()).device
        self._batch_maker = BatchMaker(spec.model, self._device, codebook)
        token_bytes = token_bytes_for(spec.model.vocab_size)
        self._sample_maker = SampleMaker(spec, token_bytes)
        self.padding = padding_token(token_bytes)  # marks padding in stored tokens

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._use_bfloat16)

    @torch.no_grad()
    def _sums(self, name: str, part: MicroBatchPart, samples: PartSamples[EncoderSamples]) -> np.ndarray:
        """Return the sum over targets and the number of targets of each loss of a part, (losses, 2)."""
        total = evaluated_samples(part, samples)
        sums = np.zeros((len(part.losses), 2))
        for start in range(0, total, part.samples):
            stop = min(total, start + part.samples)
            batch = self._batch_maker.make([part._replace(samples=stop - start)], samples.rows(start, stop))
            with self._autocast():
                losses = self._model(batch).losses
            sums += [[float(loss.value_I.double().sum()), len(loss.value_I)] for loss in losses]
            self._on_progress(name, stop, total)
        return sums

    def losses(self, samples: Mapping[str, PartSamples[EncoderSamples]]) -> dict[str, EncoderLossScore]:
        """Return the mean of each loss, by its name, over the held-out samples of each part."""
        scores = {}
        for part in self._spec.parts:
            if part.name in samples:
                sums = self._sums(part.name, part, samples[part.name])
                for name, kind, (total, count) in zip(part.losses, part.loss_kinds, sums, strict=True):
                    scores[name] = EncoderLossScore(
                        loss=total / max(1, count), targets=int(count), is_text=kind in ("text", "caption")
                    )
        return scores

    def image_value(self, pairs: Pairs) -> ImageValue | None:
        """Return the losses on hidden tokens of captions with their own image, another caption's image and no image.

        No patch is hidden, and at most `CAPTIONS_PER_IMAGE` captions of each image are used. The result is None if some
        pair has no other pair that differs in both caption and image.
        """
        pairs = with_few_captions(pairs)
        other_images = self._draw_other_images(pairs)
        if other_images is None:
            return None
        pair = MicroBatchPart("pairs", (), self._spec.train.micro_batch_size, "masked", ("image", "text"), 1.0)
        text = pair._replace(name="texts", columns=("text",))
        labels = [f"value of the image {pairs.domain} {number}" for number in range(len(pairs.images))]
        stored = {TOKENS: pairs.tokens, IMAGE: pairs.images}
        samples = self._sample_maker.make(pair, stored, labels, crops=False)
        samples = samples._replace(patch_hidden=np.zeros_like(samples.patch_hidden))
        losses, tokens = {}, 0
        for name, part, images in (
            ("own_image", pair, samples.images),
            ("other_image", pair, samples.images[other_images]),
            ("no_image", text, samples.images[:0]),
        ):
            shown_samples = samples._replace(images=images, patch_hidden=samples.patch_hidden[: len(images)])
            total, count = self._sums(f"{pairs.domain} {name.replace('_', ' ')}", part, shown_samples)[-1]
            losses[name], tokens = total / count, int(count)
        return ImageValue(pairs=len(pairs.images), tokens=tokens, **losses)

    @torch.no_grad()
    def similarities(self, candidates: Candidates) -> np.ndarray:
        """Return the cosine of each image and caption, (images, captions) float32; the model must have a match head."""
        head, size = self._model.match, self._spec.train.micro_batch_size
        assert head is not None
        image_part = MicroBatchPart("images", (), size, "contrastive", ("image",), 1.0)
        text_part = image_part._replace(name="texts", columns=("text",))
        image_vectors = [
            head.image_vectors(encoded.image_NSM[:, 0])
            for encoded in self._encode(image_part, candidates.captions[:0], candidates.images)
        ]
        text_vectors = [
            head.text_vectors(encoded.text_NTM[:, 0]) for encoded in self._encode(text_part, candidates.captions, [])
        ]
        return (torch.cat(image_vectors) @ torch.cat(text_vectors).T).cpu().numpy()

    def _encode(self, part: MicroBatchPart, tokens: np.ndarray, images: Sequence[bytes]) -> Iterator[Encoded]:
        """Yield the outputs for images alone or stored texts, (texts, T), alone, `part.samples` samples at a time."""
        count = max(len(tokens), len(images))
        for start in range(0, count, part.samples):
            stop = min(count, start + part.samples)
            batch_part = part._replace(samples=stop - start)
            stored = {TOKENS: tokens[start:stop], IMAGE: images[start:stop]}
            samples = self._sample_maker.make(batch_part, stored, [""] * batch_part.samples, crops=False)
            with self._autocast():
                encoded = self._model.encode(self._batch_maker.make([batch_part], samples))
            yield encoded
            self._on_progress(f"vectors of {part.name}", stop, count)

    @torch.no_grad()
    def count_routes(self, pairs: Pairs) -> dict[str, RoutingCounts]:
        """Return how often the images and the texts of pairs choose each expert when nothing in them is hidden.

        At most `CAPTIONS_PER_IMAGE` captions of each image are counted. The result is empty if tokens choose no
        experts.
        """
        moe, batch_size = self._model.spec.moe, self._spec.train.micro_batch_size
        if moe is None or moe.router == "smear":
            return {}
        pairs = with_few_captions(pairs)
        counter = RouteCounter(self._model)
        # The samples are made for the objective contrastive, which hides nothing. If attention read the image and the
        # text of a pair together in training, the batch gets the objective masked, under which attention also reads
        # them together.
        objective = "masked" if any(part.is_joint for part in self._spec.parts) else "contrastive"
        pair = MicroBatchPart("pairs", (), batch_size, "contrastive", ("image", "text"), 1.0)
        for start in range(0, len(pairs.images), batch_size):
            stop = min(len(pairs.images), start + batch_size)
            part = pair._replace(samples=stop - start)
            stored = {TOKENS: pairs.tokens[start:stop], IMAGE: pairs.images[start:stop]}
            samples = self._sample_maker.make(part, stored, [""] * part.samples, crops=False)
            batch = self._batch_maker.make([part._replace(objective=objective)], samples)
            is_text_N = torch.zeros(batch.token_NT.numel(), dtype=torch.bool, device=self._device)
            is_image_N = torch.ones(part.samples * self._model.image_tokens, dtype=torch.bool, device=self._device)
            masks = {
                "images": torch.cat([is_image_N, is_text_N]),
                "texts": torch.cat([~is_image_N, batch.is_token_NT.flatten()]),
            }
            for modality, mask_N in masks.items():
                with self._autocast(), counter.counting_routes(f"{pairs.domain} {modality}", mask_N):
                    self._model.encode(batch)
            self._on_progress(f"routes of {pairs.domain}", stop, len(pairs.images))
        return counter.routing_counts()

    @torch.no_grad()
    def features(self, images: Sequence[bytes]) -> np.ndarray:
        """Return features, (images, 2 * width) float32: the output for the whole image, and the mean over patches."""
        part = MicroBatchPart("images", (), self._spec.train.micro_batch_size, "contrastive", ("image",), 1.0)
        features = []
        for encoded in self._encode(part, np.empty((0, self._spec.data.seq_len)), images):
            parts = [encoded.image_NSM[:, 0], encoded.image_NSM[:, 1:].mean(1)]
            features.append(torch.cat(parts, 1).float().cpu().numpy())
        return np.concatenate(features)

    @torch.no_grad()
    def answers(self, part: MicroBatchPart, pairs: Pairs, classes: int, *, shows_images: bool) -> list[int]:
        """Return the class that the model gives each text among the first `classes`; without images, they are grey."""
        numbers, [kind] = list[int](), part.loss_kinds
        for start in range(0, len(pairs.images), part.samples):
            stored = {name: values[start : start + part.samples] for name, values in pairs.columns.items()}
            batch_part = part._replace(samples=len(stored[IMAGE]))
            samples = self._sample_maker.make(batch_part, stored, [""] * batch_part.samples, crops=False)
            if not shows_images:
                samples = samples._replace(images=np.full_like(samples.images, 128))
            with self._autocast():
                encoded = self._model.encode(self._batch_maker.make([batch_part], samples))
                logits = self._model.class_logits(kind, encoded, slice(None), slice(None))
            numbers += logits[:, :classes].argmax(1).tolist()
            self._on_progress(f"answers of {pairs.domain}", len(numbers), len(pairs.images))
        return numbers

    def captions(self, images: Sequence[bytes], start_token: int) -> list[list[int]]:
        """Return the tokens of the caption that the model writes for each image."""
        assert self._spec.model.encoder is not None
        size, batch = self._spec.model.encoder.image_size, self._spec.train.micro_batch_size
        captions = list[list[int]]()
        for start in range(0, len(images), batch):
            crops = np.stack([read_crop(image, size) for image in images[start : start + batch]])
            with self._autocast():
                image_NYXC = copy_to_device(crops, self._device)
                captions += write_captions(self._model, image_NYXC, start_token, self._spec.data.seq_len - 1)
            self._on_progress("captions", len(captions), len(images))
        return captions

    def _draw_other_images(self, pairs: Pairs) -> list[int] | None:
        """Draw for each pair another one that differs in both caption and image; return None if a pair has none."""
        rng = np.random.Generator(np.random.Philox(key=seeded_hash(self._spec.seed, f"other images {pairs.domain}")))
        captions = np.unique(pairs.tokens, axis=0, return_inverse=True)[1].ravel()
        images = distinct_images(pairs.images)[1]
        other_images = []
        for caption, image in zip(captions, images, strict=True):
            is_other = (captions != caption) & (images != image)
            if not is_other.any():
                return None
            number = int(rng.integers(len(captions)))
            while not is_other[number]:
                number = int(rng.integers(len(captions)))
            other_images.append(number)
        return other_images


def with_few_captions(pairs: Pairs) -> Pairs:
    """Return pairs with at most `CAPTIONS_PER_IMAGE` captions per image, evenly spaced among all its captions."""
    pairs_by_image: dict[int, list[int]] = {}
    for number, image in enumerate(distinct_images(pairs.images)[1]):
        pairs_by_image.setdefault(int(image), []).append(number)
    numbers = sorted(
        numbers[position * len(numbers) // count]
        for numbers in pairs_by_image.values()
        for count in [min(len(numbers), CAPTIONS_PER_IMAGE)]
        for position in range(count)
    )
    images, languages = [pairs.images[number] for number in numbers], [pairs.languages[number] for number in numbers]
    return Pairs(pairs.domain, pairs.tokens[numbers], images, languages)


def raw_pairs(data: DataSpec, encoder: DocumentEncoder, spec: RunSpec, max_images: int) -> Iterator[Pairs]:
    """Yield the pairs of image and caption of each domain of raw data, in the order of its files.

    A domain ends before the first image that exceeds `max_images`. Long captions are cut to the sequence length. A
    source without pairs, or a domain without a readable one, is a DataError.
    """
    seq_len, token_bytes = spec.data.seq_len, token_bytes_for(spec.model.vocab_size)
    for name, source in data.sources.items():
        if len(source.sample_columns) < 2:
            fix = f"set data.sources.{name}.format to that of the images, such as webdataset"
            raise DataError(f"source {name}", "it has no pairs of an image and a text", fix)
    pairs_by_domain: dict[str, list[tuple[np.ndarray, bytes, str | None, bytes | None, bytes | None]]] = {}
    images_by_domain: dict[str, dict[str, bytes]] = {}
    complete_domains = set[str]()
    for file in find_files(data):
        pairs, images = pairs_by_domain.setdefault(file.domain, []), images_by_domain.setdefault(file.domain, {})
        if file.domain in complete_domains:
            continue
        for item in FileReader(file, data):
            if not isinstance(item, Document) or item.image is None:
                continue
            assert item.image_hash is not None
            if item.image_hash not in images and len(images) == max_images:
                complete_domains.add(file.domain)
                break
            # All captions of an image share its bytes.
            image = images.setdefault(item.image_hash, item.image)
            tokens = encoder.encode([item.text])[0]
            [row] = token_rows(tokens, True, seq_len, padding_token(token_bytes), token_bytes)
            pairs.append((row, image, item.language, item.second_image, item.annotation))
    for domain, pairs in pairs_by_domain.items():
        if not pairs:
            raise DataError(f"images {domain}", "no pair in them can be read", "see `mhmoe data inspect`")
        rows, image_files, languages, second_images, contents = zip(*pairs, strict=True)
        yield Pairs(
            domain,
            np.stack(rows),
            list(image_files),
            list(languages),
            [image for image in second_images if image is not None],
            [unpack(content) for content in contents if content is not None],
        )
