"""Data of encoders: rows of images, texts and pairs, and the codebook of image patches."""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mhmoe_ray.data.domains import source_of
from mhmoe_ray.data.family import Facts, FamilyData
from mhmoe_ray.data.shards.columns import token_bytes_for
from mhmoe_ray.data.shards.manifest import CLASSES_FILE, CODEBOOK_FILE, DataManifest, EncoderData, read_classes
from mhmoe_ray.errors import DataError
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, describe_file, file_problem, write_json

if TYPE_CHECKING:
    from mhmoe_ray.data.prepare.parts import TokenisedPart
    from mhmoe_ray.data.samples import TrainingSamples
    from mhmoe_ray.data.shards.manifest import Shard
    from mhmoe_ray.families.encoder.data.samples import SampleMaker

OTHER_ANSWERS = 10
"""Number of answers outside of the classes that a preparation names."""


class EncoderRows(FamilyData):
    """Data of encoders."""

    def add_to_recipe(self, spec: RunSpec, settings: dict[str, Any]) -> None:
        encoder = spec.model.encoder
        assert encoder is not None
        for name, source in spec.data.sources.items():
            settings["reading"][name] |= {"columns": [*source.sample_columns], "image_field": source.image_field}
            if source.languages is not None:
                settings["reading"][name]["languages"] = source.languages
        settings |= {"sample": "text", "max_megapixels": spec.data.images.max_megapixels}
        if encoder.answers is not None:
            settings["answers"] = [
                encoder.answers,
                {p.name: [*p.sources] for p in spec.parts if p.objective == "answer"},
            ]
        if spec.has_codebook:
            settings["codebook"] = [encoder.codebook_size, encoder.image_size, encoder.patch_size]

    def check_parts(self, spec: RunSpec, folder: Location, by_domain: "dict[str, list[TokenisedPart]]") -> Facts:
        check_rows_not_empty(spec, by_domain)
        return {}

    def finish(
        self,
        spec: RunSpec,
        folder: Location,
        by_domain: "Mapping[str, Sequence[TokenisedPart]]",
        shards: "Mapping[str, Sequence[Shard]]",
        log: Callable[[str], None],
    ) -> Facts:
        data = EncoderData()
        if spec.model.has_classes:
            path = folder / CLASSES_FILE
            write_json(path, answers_of_parts(spec, by_domain, log))
            data.classes_sha256 = describe_file(path).sha256
        if not spec.has_codebook:
            return {"encoder": data}
        # These modules need Ray, or torch, whose import takes seconds, and few preparations make a codebook.
        import ray

        from mhmoe_ray.families.encoder.data.codebook import write_codebook

        encoder = spec.model.encoder
        assert encoder is not None
        log(f"codebook of {encoder.codebook_size:,} entries")
        # In each domain, either all training samples have an image or none has.
        image_domains = [
            name for name, parts in by_domain.items() if any(p.counts.rows and p.counts.rows.images for p in parts)
        ]
        image_shards = {name: shards[name] for name in image_domains}
        write = ray.remote(write_codebook).options(num_cpus=1)
        token_bytes = token_bytes_for(spec.model.vocab_size)
        data.codebook_sha256 = ray.get(write.remote(folder, image_shards, encoder, token_bytes))
        return {"encoder": data}

    def micro_batch_bytes(self, spec: RunSpec) -> int:
        encoder = spec.model.encoder
        assert encoder is not None
        images, texts = (sum(part.pairs for part in spec.parts if name in part.columns) for name in ("image", "text"))
        # A pixel has three bytes, and a patch has a mask of one byte. A token of a text has nine: four as stored, four
        # as input, and a mask.
        return images * (3 * encoder.image_size**2 + encoder.patches) + texts * 9 * spec.data.seq_len

    def sample_maker(self, spec: RunSpec, manifest: DataManifest) -> "SampleMaker":
        from mhmoe_ray.families.encoder.data.samples import SampleMaker

        answers = read_classes(spec.data.prepared / CLASSES_FILE) if spec.model.has_classes else None
        return SampleMaker(spec, manifest.token_bytes, answers)

    def stream_columns(self, samples: "TrainingSamples", rows: np.ndarray) -> dict[str, np.ndarray]:
        micro_batches = [EncoderSamples.join(samples.read_micro_batch(int(row)).values()) for row in rows]
        return {name: np.stack([getattr(row, name) for row in micro_batches]) for name in EncoderSamples._fields}


def answers_of_parts(
    spec: RunSpec, by_domain: "Mapping[str, Sequence[TokenisedPart]]", log: Callable[[str], None]
) -> dict[str, list[str]]:
    """Return the most frequent answers to the training questions of each part, the most frequent first.

    `log` gets the number of questions with another answer, and examples of these answers.
    """
    assert spec.model.encoder is not None
    answers = {}
    for part in spec.parts:
        if part.objective == "answer":
            counts = Counter[str]()
            for domain, parts in by_domain.items():
                if source_of(domain) in part.sources:
                    for prepared_part in parts:
                        counts.update(prepared_part.counts.rows.class_counts if prepared_part.counts.rows else {})
            ranked_answers = sorted(counts, key=lambda answer: (-counts[answer], answer))
            answers[part.name] = ranked_answers[: spec.model.encoder.answers]
            if other_answers := ranked_answers[spec.model.encoder.answers :]:
                questions = sum(counts[answer] for answer in other_answers)
                examples = ", ".join(map(repr, other_answers[:OTHER_ANSWERS]))
                log(
                    f"part {part.name}: {questions:,} of {counts.total():,} questions have an answer that is not among "
                    f"the {spec.model.encoder.answers:,} most frequent: {examples}"
                )
    return answers


def check_rows_not_empty(spec: RunSpec, by_domain: "dict[str, list[TokenisedPart]]") -> None:
    """Raise a DataError if training samples, held-out samples, or image patches for the codebook are missing.

    If any source has texts, some training samples and some held-out samples must have a text.
    """
    assert spec.model.encoder is not None
    counts = [part.counts for parts in by_domain.values() for part in parts]
    fix = "raise data.validation_fraction or add documents"
    if not any(count.held_out_documents for count in counts):
        raise DataError("validation", "no document is in the held-out share", fix)
    if not any(count.rows and count.rows.samples for count in counts):
        raise DataError("training", "every document is in the held-out share", "add documents")
    if spec.data.has_texts:
        if not any(count.held_out_tokens for count in counts):
            raise DataError("validation", "no document of the held-out share has a text", fix)
        if not any(count.rows and count.rows.targets for count in counts):
            raise DataError("training", "no document has a text to train on", "add documents with texts")
    patches = sum(count.rows.images for count in counts if count.rows) * spec.model.encoder.patches
    entries = spec.model.encoder.codebook_size
    if spec.has_codebook and patches < entries:
        reason = f"its images have {patches:,} patches, fewer than the {entries:,} entries of the codebook"
        raise DataError("training", reason, "add images, or lower model.encoder.codebook_size")


def read_codebook(folder: Location, manifest: DataManifest) -> np.ndarray | None:
    """Return a folder's codebook, float32 (entries, values), or None; a missing or damaged file is a DataError."""
    if manifest.encoder is None or manifest.encoder.codebook_sha256 is None:
        return None
    path = folder / CODEBOOK_FILE
    if problem := file_problem(path, manifest.encoder.codebook_sha256):
        raise DataError(f"prepared file {path}", problem, f"remove {folder} and prepare again")
    codebook: np.ndarray = np.load(io.BytesIO(path.read_bytes()))
    return codebook
