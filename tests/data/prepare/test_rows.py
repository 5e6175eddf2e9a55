"""Tests of the validation samples of encoders and vision models, and of the warning of too few of them."""

import numpy as np
import pytest

from mhmoe_ray.data.prepare.checks import sparse_parts
from mhmoe_ray.data.prepare.finish import finish
from mhmoe_ray.data.prepare.packing import PackingSettings
from mhmoe_ray.data.prepare.parts import PartCounts, PartSlice, RowCounts, TokenisedPart, part_file
from mhmoe_ray.data.prepare.rows import plan_row_shards, write_validation_rows
from mhmoe_ray.data.prepare.validation import select_rows
from mhmoe_ray.data.shards.columns import IMAGE, TOKENS
from mhmoe_ray.data.shards.files import file_content, to_batch
from mhmoe_ray.data.shards.manifest import Domain
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.data.shards.recipe import recipe
from mhmoe_ray.errors import DataError
from mhmoe_ray.families.encoder.data.rows import check_rows_not_empty
from tests.support.encoders import ENCODER, encoder_spec


def settings(folder):
    """Return the settings of a preparation whose parts are in the subfolder `parts`."""
    return PackingSettings(folder, folder / "parts", seq_len=4, token_bytes=2, start=0)


def selected_counts(available, max_samples):
    return {name: len(rows) for name, rows in select_rows(available, max_samples).items()}


@pytest.mark.parametrize(
    ("available", "max_samples", "expected"),
    [
        # All samples of a rare source are selected, and the other sources share the rest equally.
        ({"pairs/all": 6, "texts/de": 9000, "images/a": 40}, 50, {"pairs/all": 6, "texts/de": 22, "images/a": 22}),
        # A source of many domains has no larger share than a source of one.
        ({"a/1": 50, "a/2": 50, "a/3": 2, "b/all": 500}, 40, {"a/1": 9, "a/2": 9, "a/3": 2, "b/all": 20}),
        # Samples that cannot be divided equally go to the rarest sources.
        ({"a/all": 9, "b/all": 8, "c/all": 7}, 5, {"a/all": 1, "b/all": 2, "c/all": 2}),
        ({"a/all": 3, "b/all": 0, "c/all": 4}, 100, {"a/all": 3, "b/all": 0, "c/all": 4}),
    ],
)
def test_sources_and_their_domains_get_equal_shares(available, max_samples, expected):
    assert selected_counts(available, max_samples) == expected


def test_selected_rows_are_evenly_spaced():
    selected = select_rows({"a/all": 1000, "b/all": 5}, 105)
    assert selected["b/all"].tolist() == [0, 1, 2, 3, 4]
    assert (selected["a/all"][0], selected["a/all"][-1]) == (0, 999)
    assert set(np.diff(selected["a/all"])) == {10, 11}


def test_validation_samples_are_rows_of_their_slices(tmp_path):
    """Each domain has the held-out rows of several parts."""
    held_out = {}
    for domain, first_token in (("a/all", 0), ("b/all", 100)):
        held_out[domain] = []
        for part in range(3):
            tokens = np.arange(10, dtype=np.uint16)[:, None].repeat(4, 1) + np.uint16(first_token + 10 * part)
            path = part_file(tmp_path / "parts", f"{domain[0]}{part}", has_rows=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file_content(to_batch({TOKENS: tokens, IMAGE: [b""] * 10})))
            held_out[domain].append(PartSlice(f"{domain[0]}{part}", 6, 10))
    split = write_validation_rows(settings(tmp_path), held_out, 6)
    assert split.sample_counts == {"a/all": 3, "b/all": 3}
    tokens = ShardReader(tmp_path, split.shards, 2).read(np.arange(6))
    assert tokens[:, 0].tolist() == [6, 18, 29, 106, 118, 129]


def test_validation_shards_are_filled_with_rows(tmp_path, monkeypatch):
    """The size of a shard counts the images of its own rows, and not those of other rows of the same part."""
    monkeypatch.setattr("mhmoe_ray.data.prepare.rows.SHARD_BYTES", 25_000)
    path = part_file(tmp_path / "parts", "part", has_rows=True)
    path.parent.mkdir(parents=True)
    images = [bytes([number]) * 10_000 for number in range(8)]
    path.write_bytes(file_content(to_batch({TOKENS: np.zeros((8, 4), np.uint16), IMAGE: images})))
    split = write_validation_rows(settings(tmp_path), {"a/all": [PartSlice("part", 0, 8)]}, 8)
    assert [shard.rows for shard in split.shards] == [3, 3, 2]
    assert ShardReader(tmp_path, split.shards, 2).read_values("image", np.arange(8)) == images


def test_a_part_with_less_than_a_micro_batch_of_held_out_samples_is_a_warning():
    counts = {"captions/a": 2, "captions/b": 1, "pictures/all": 1, "described/all": 0, "matched/all": 3}
    domains = {name: Domain.model_construct(validation_samples=count) for name, count in counts.items()}
    warnings = sparse_parts(encoder_spec(), domains)
    assert [warning.partition(", ")[0] for warning in warnings] == [
        "part images has fewer held-out samples (1) than samples in a micro-batch (2)",
        "part pairs has fewer held-out samples (0) than samples in a micro-batch (4)",
    ]


CODEBOOK = {"model__encoder__image_targets": "codebook", "model__encoder__codebook_size": 500}


def fine_tuning_spec(part, **changes):
    """Return the spec of a fine-tuning whose micro-batches have only one of the parts that `ENCODER` has."""
    section = ENCODER["data"]["parts"][part]
    return encoder_spec(
        start={"from": "pretrained"},
        data__parts={part: section},
        data__sources={name: ENCODER["data"]["sources"][name] for name in section["sources"]},
        train__micro_batch_size=section["micro_batch_size"],
        model__encoder__d_match=8 if part == "match" else None,
        **changes,
    )


def test_fine_tuning_on_images_alone_needs_no_texts(tmp_path):
    spec = fine_tuning_spec("images", data__prepared=str(tmp_path))
    counts = PartCounts(documents=8, held_out_documents=2, rows=RowCounts(samples=8, held_out_samples=2, images=8))
    check_rows_not_empty(spec, {"pictures/all": [TokenisedPart(0, 0, "part", counts)]})
    path = part_file(tmp_path / "parts", "part", has_rows=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(file_content(to_batch({TOKENS: np.full((10, 12), 65_535, np.uint16), IMAGE: [b"an image"] * 10})))
    held_out = {"pictures/all": [PartSlice("part", 8, 10)]}
    result = finish(settings(tmp_path), held_out, {"pictures/all": []}, spec)
    assert result.baselines is None
    assert result.validation.sample_counts == {"pictures/all": 2}
    # An encoder that also reads texts needs held-out documents with a text.
    with pytest.raises(DataError, match="no document of the held-out share has a text"):
        check_rows_not_empty(encoder_spec(), {"pictures/all": [TokenisedPart(0, 0, "part", counts)]})


@pytest.mark.parametrize("part", ["texts", "match"])
def test_a_codebook_that_no_part_predicts_is_not_made(part):
    spec = fine_tuning_spec(part, **CODEBOOK)
    rows = RowCounts(samples=8, held_out_samples=2, images=2, targets=20)
    parts = {
        "x/all": [TokenisedPart(0, 0, "", PartCounts(documents=8, held_out_documents=2, held_out_tokens=5, rows=rows))]
    }
    check_rows_not_empty(spec, parts)
    assert "codebook" not in recipe(spec)
    pretraining_spec = encoder_spec(**CODEBOOK)
    with pytest.raises(DataError, match="its images have 32 patches, fewer than the 500 entries of the codebook"):
        check_rows_not_empty(pretraining_spec, parts)
    assert "codebook" in recipe(pretraining_spec)


def test_a_shard_has_a_limited_number_of_parts(monkeypatch):
    """All parts of a shard are mapped at once when it is written."""
    monkeypatch.setattr("mhmoe_ray.data.prepare.rows.SHARD_PARTS", 3)
    counts = [PartCounts(documents=1, rows=RowCounts(samples=number % 4)) for number in range(12)]
    parts = [TokenisedPart(0, number, f"part{number}", counts[number]) for number in range(12)]
    plans = plan_row_shards("a/all", parts, 8)
    assert [len(plan.slices) for plan in plans] == [3, 3, 3]
    assert [s.name for plan in plans for s in plan.slices] == [f"part{n}" for n in range(12) if n % 4]
