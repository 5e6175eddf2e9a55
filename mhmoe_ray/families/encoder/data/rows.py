"""Data of encoders: rows of images, texts and pairs, and the codebook of image patches."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mhmoe_ray.data.family import Facts, FamilyData
from mhmoe_ray.data.shards.columns import token_bytes_for
from mhmoe_ray.data.shards.manifest import CODEBOOK_FILE, DataManifest, EncoderData
from mhmoe_ray.errors import DataError
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, file_problem

if TYPE_CHECKING:
    from mhmoe_ray.data.prepare.parts import TokenisedPart
    from mhmoe_ray.data.samples import TrainingSamples
    from mhmoe_ray.data.shards.manifest import Shard
    from mhmoe_ray.families.encoder.data.samples import SampleMaker


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
        if not spec.has_codebook:
            return {"encoder": EncoderData()}
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
        codebook_sha256 = ray.get(write.remote(folder, image_shards, encoder, token_bytes))
        return {"encoder": EncoderData(codebook_sha256=codebook_sha256)}

    def micro_batch_bytes(self, spec: RunSpec) -> int:
        encoder = spec.model.encoder
        assert encoder is not None
        images, texts = (sum(part.samples for part in spec.parts if name in part.columns) for name in ("image", "text"))
        # A pixel has three bytes, and a patch has a mask of one byte. A token of a text has nine: four as stored, four
        # as input, and a mask.
        return images * (3 * encoder.image_size**2 + encoder.patches) + texts * 9 * spec.data.seq_len

    def sample_maker(self, spec: RunSpec, manifest: DataManifest) -> "SampleMaker":
        from mhmoe_ray.families.encoder.data.samples import SampleMaker

        return SampleMaker(spec, manifest.token_bytes)

    def stream_columns(self, samples: "TrainingSamples", rows: np.ndarray) -> dict[str, np.ndarray]:
        micro_batches = [EncoderSamples.join(samples.read_micro_batch(int(row)).values()) for row in rows]
        return {name: np.stack([getattr(row, name) for row in micro_batches]) for name in EncoderSamples._fields}


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
