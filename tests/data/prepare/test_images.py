"""Tests of the preparation of images and texts for an encoder, on a real cluster."""

import filecmp
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mhmoe_ray.data.prepare.job import PrepareRequest
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.shards.columns import padding_token
from mhmoe_ray.data.shards.documents import DocumentIndex
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.data.shards.recipe import recipe, require_prepared_data
from mhmoe_ray.data.shards.verify import verify_shards
from mhmoe_ray.data.sources.images import image_hash
from mhmoe_ray.data.tokenizer import END_OF_TEXT, load_tokenizer
from mhmoe_ray.errors import DataError
from mhmoe_ray.families.encoder.data.batches import normalized_patches
from mhmoe_ray.families.images.crops import read_crop
from mhmoe_ray.families.images.patches import image_patches
from mhmoe_ray.spec import RunSpec, dump_spec
from mhmoe_ray.storage import describe_file
from tests.data.texts import make_documents, write_documents
from tests.support.cluster_jobs import run_on_cluster
from tests.support.image_packages import write_with_datasets, write_with_webdataset
from tests.support.images import (
    encoder_spec,
    make_images,
    tar_members,
    write_coco,
    write_image_folder,
    write_parquet,
    write_tar,
)

pytestmark = pytest.mark.ray

T = 32
LONG_IMAGES = [p._replace(name=f"long-{p.name}") for p in make_images(8, words=40, size=40)]
IMAGES = make_images(60, words=1) + LONG_IMAGES
TEXTS = make_documents("text", 40, words=12)
FORMATS = {
    "tar": {"format": "webdataset"},
    "saved": {"format": "huggingface", "columns": ["image", "text"]},
    "parquet": {"format": "parquet", "columns": ["image", "text"]},
    "plain": {"format": "parquet", "columns": ["image", "text"], "image_field": "jpg"},
    "coco/annotations": {"format": "coco"},
}


class Results(NamedTuple):
    """Specs that a job prepared."""

    by_format: dict[str, RunSpec]
    mixed: RunSpec
    """Spec with a source of pairs, one of texts, one of images and one of captions alone."""
    serial: RunSpec
    """Spec of the data of `mixed`, prepared by one task at a time in many chunks."""
    killed: RunSpec
    """Spec of the data of `mixed`; the first job of its preparation was killed."""
    lines: list[str]


@pytest.fixture(scope="module")
def results(local_cluster, tmp_path_factory):
    """Prepare all specs in one job, after a job that SIGKILL ends, and return them."""
    folder = tmp_path_factory.mktemp("pictures")
    write_with_webdataset(folder / "tar", IMAGES)
    write_with_datasets(folder, IMAGES)
    write_parquet(folder / "plain" / "rows.parquet", IMAGES, "jpg")
    write_coco(folder / "coco", IMAGES)
    write_image_folder(folder / "folder" / "a", IMAGES[:20])
    write_image_folder(folder / "folder" / "b", IMAGES[20:30])
    write_documents(folder / "texts" / "en" / "f.jsonl", TEXTS)
    write_tar(folder / "bad" / "a.tar", [*tar_members(IMAGES[:9]), ("x.png", b"no image"), ("x.txt", b"a text")])
    # All specs have one tokenizer, so that they have the same tokens.
    (folder / "tokenizer.json").write_text(tokenizer_content())
    common = {"tokenizer": "tokenizer.json"}
    by_format = {
        name: encoder_spec(folder, {"web": {"path": name, **keys}}, prepared=f"made/{name.partition('/')[0]}", **common)
        for name, keys in FORMATS.items()
    }
    sources = {
        "pairs": {"path": "bad", "format": "webdataset"},
        "texts": {"path": "texts"},
        "pictures": {"path": "folder", "format": "images"},
        "captions": {"path": "bad", "format": "webdataset", "columns": ["text"]},
    }
    codebook = {"image_targets": "codebook", "codebook_size": 40}
    mixed, serial, killed = (
        encoder_spec(folder, sources, codebook, prepared=f"made/{name}/data", max_bad_lines=1)
        for name in ("mixed", "serial", "killed")
    )
    run_on_cluster(
        local_cluster,
        "tests.data.prepare.prepare_and_die",
        # The job is killed after 30 of some 40 parts, because the log mentions only the reuse of parts with text, and
        # the first few parts may all have images alone.
        30,
        expected_status="FAILED",
        **PrepareRequest.from_spec(killed).environment,
    )
    args = []
    tasks = [("together", spec) for spec in (*by_format.values(), mixed)] + [("serially", s) for s in (serial, killed)]
    for number, (task, spec) in enumerate(tasks):
        (folder / f"{number}.yaml").write_text(dump_spec(spec))
        args += [task, folder / f"{number}.yaml"]
    lines = run_on_cluster(local_cluster, "tests.data.prepare.in_one_job", *args)
    return Results(by_format, mixed, serial, killed, lines)


def tokenizer_content() -> str:
    """Return the tokenizer.json of a byte-level BPE with few merges."""
    from mhmoe_ray.data.tokenizer.train import train_bpe

    return train_bpe([picture.caption for picture in IMAGES[:5]], 280).to_str()


def read_rows(folder: Path, shards) -> list[tuple[bytes, bytes]]:
    """Return the tokens as bytes and the image of each row of some shards."""
    reader = ShardReader(folder, shards, 2)
    tokens, images = reader.read(np.arange(len(reader))), reader.read_values("image", np.arange(len(reader)))
    return [(row.tobytes(), image) for row, image in zip(tokens, images, strict=True)]


def make_row(tokens) -> bytes:
    row = np.full(T, padding_token(2), "<u2")
    row[: len(tokens)] = tokens
    return row.tobytes()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_prepares_to_the_same_samples(results, name):
    spec = results.by_format[name]
    folder, manifest = spec.data.prepared, require_prepared_data(spec)
    tokenizer = load_tokenizer(folder / "tokenizer.json", spec.model.text_vocab_size)
    start = tokenizer.token_to_id(END_OF_TEXT)
    rows = {False: Counter(), True: Counter()}
    token_ids = [tokenizer.encode(picture.caption).ids for picture in IMAGES]
    for picture, ids in zip(IMAGES, token_ids, strict=True):
        held_out = is_validation(image_hash(picture.image), 0.2)
        rows[held_out][make_row([start, *ids[: T - 1]]), picture.image] += 1
    entry = manifest.domains["web/all"]
    assert Counter(read_rows(folder, entry.shards)) == rows[False]
    assert Counter(read_rows(folder, manifest.validation)) == rows[True]
    assert entry.images == entry.samples == entry.documents == rows[False].total()
    assert entry.image_bytes == sum(len(image) * n for (_, image), n in rows[False].items())
    train_ids = [
        ids for picture, ids in zip(IMAGES, token_ids, strict=True) if not is_validation(image_hash(picture.image), 0.2)
    ]
    assert entry.tokens == sum(1 + len(ids) for ids in train_ids)
    assert entry.cut_documents == sum(len(ids) > T - 1 for ids in train_ids) > 0
    assert entry.unused_tokens == sum(max(0, len(ids) - (T - 1)) for ids in train_ids)
    assert entry.padding == entry.samples * T - (entry.tokens - entry.unused_tokens)
    assert 0 < manifest.validation_tokens < (T - 1) * len(rows[True])
    assert 0 < manifest.baselines.bigram < manifest.baselines.unigram_entropy + 1
    assert entry.size == entry.samples


def test_an_encoder_reads_pairs_texts_and_images(results):
    spec = results.mixed
    folder, manifest = spec.data.prepared, require_prepared_data(spec)
    tokenizer = load_tokenizer(folder / "tokenizer.json", 299)
    start = tokenizer.token_to_id(END_OF_TEXT)
    expected = Counter()
    texts = [text for text in TEXTS if not is_validation(text, 0.2)]
    for text in texts:
        ids = tokenizer.encode(text).ids
        for offset in range(0, len(ids), T - 1):
            expected[make_row([start, *ids[offset : offset + T - 1]]), b""] += 1
    entry = manifest.domains["texts/en"]
    assert Counter(read_rows(folder, entry.shards)) == expected
    assert (entry.documents, entry.images, entry.image_bytes, entry.unused_tokens) == (len(texts), 0, 0, 0)
    assert entry.cut_documents == sum(len(tokenizer.encode(text).ids) > T - 1 for text in texts) > 0
    assert len(texts) < entry.samples == expected.total()
    for name, pictures in {"pictures/a": IMAGES[:20], "pictures/b": IMAGES[20:30]}.items():
        images = [p.image for p in pictures if not is_validation(image_hash(p.image), 0.2)]
        assert Counter(read_rows(folder, manifest.domains[name].shards)) == Counter((make_row([]), i) for i in images)
        assert manifest.domains[name].tokens == 0
        assert manifest.domains[name].padding == T * len(images)
    pairs = read_rows(folder, manifest.domains["pairs/all"].shards)
    captions = read_rows(folder, manifest.domains["captions/all"].shards)
    # A caption that is read without its image is held out if the image is.
    assert {tokens for tokens, _ in pairs} == {tokens for tokens, _ in captions} - {
        make_row([start, *tokenizer.encode("a text").ids])
    }
    assert manifest.domains["pairs/all"].quarantined == {"it is not an image": 1}
    [line] = (folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["detail"] == "x"
    assert json.loads(line)["line"] == 19


def test_validation_samples_are_spread_over_all_domains(results):
    manifest = require_prepared_data(results.mixed)
    counts = {name: domain.validation_samples for name, domain in manifest.domains.items()}
    assert sum(counts.values()) == sum(shard.rows for shard in manifest.validation)
    rows = read_rows(results.mixed.data.prepared, manifest.validation)
    has_image = [bool(image) for _, image in rows]
    expected = []
    for name, count in counts.items():
        expected += [not name.startswith(("texts", "captions"))] * count
    assert has_image == expected
    assert counts["texts/en"] > 1


def test_the_index_names_the_image_and_the_line_of_each_row(results):
    folder, manifest = results.mixed.data.prepared, require_prepared_data(results.mixed)

    def origins(name):
        index = DocumentIndex(folder, manifest.domains[name].shards)
        return [index.documents_of(number)[0] for number in range(manifest.domains[name].samples)]

    for name in ("pictures/a", "pictures/b"):
        images = [image for _, image in read_rows(folder, manifest.domains[name].shards)]
        assert [Path(origin.file).read_bytes() for origin in origins(name)] == images
    images_by_name = {picture.name.partition(".")[0]: picture.image for picture in IMAGES}
    images = [image for _, image in read_rows(folder, manifest.domains["pairs/all"].shards)]
    assert [images_by_name[Path(origin.file).name] for origin in origins("pairs/all")] == images
    tokenizer = load_tokenizer(folder / "tokenizer.json", 299)
    expected = []
    for line, text in enumerate(TEXTS, 1):
        if not is_validation(text, 0.2):
            expected += [line] * -(-len(tokenizer.encode(text).ids) // (T - 1))
    assert [origin.line for origin in origins("texts/en")] == expected


@pytest.mark.parametrize("name", ["serial", "killed"])
def test_result_is_independent_of_tasks_chunks_and_kills(results, name):
    first_folder, second_folder = results.mixed.data.prepared, getattr(results, name).data.prepared
    names = sorted(str(p.relative_to(first_folder)) for p in first_folder.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second_folder)) for p in second_folder.rglob("*") if p.is_file())
    assert len(names) == 15
    assert filecmp.cmpfiles(first_folder, second_folder, names, shallow=False)[1:] == ([], [])
    assert [*second_folder.parent.iterdir()] == [second_folder]


def test_a_killed_preparation_reuses_parts(results):
    assert any("of them from an earlier job" in line for line in results.lines)


def test_codebook_has_the_nearest_entries_of_patches(results):
    folder, manifest = results.mixed.data.prepared, require_prepared_data(results.mixed)
    codebook = np.load(folder / "codebook.npy")
    assert codebook.shape == (40, 3 * 8 * 8)
    assert codebook.dtype == np.float32
    assert manifest.encoder.codebook_sha256 == describe_file(folder / "codebook.npy").sha256
    image_NYXC = torch.from_numpy(read_crop(IMAGES[0].image, 32).copy())[None]
    patches = normalized_patches(image_patches(image_NYXC, 8)[0]).numpy()
    distances = np.square(patches[:, None] - codebook).sum(axis=2)
    # The nearest entries explain at least 5 per cent of the variance of the patches.
    assert distances.min(axis=1).mean() < 0.95 * np.square(patches).sum(axis=1).mean()


def test_damaged_shards_of_rows_are_reported(results):
    folder, manifest = results.killed.data.prepared, require_prepared_data(results.killed)
    verify_shards(folder, manifest)
    file = folder / manifest.domains["pairs/all"].shards[0].file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"pairs/all/00000\.arrow: its content is not what was written"):
        verify_shards(folder, manifest)


def test_settings_of_images_are_part_of_the_recipe(results):
    spec = results.by_format["plain"]
    first_recipe = recipe(spec)
    assert first_recipe["sample"] == "text"
    assert first_recipe["reading"]["web"]["image_field"] == "jpg"
    changes = [{"images": spec.data.images.model_copy(update={"max_megapixels": 1.0})}]
    changes.append({"sources": {"web": spec.data.sources["web"].model_copy(update={"columns": ["image"]})}})
    for change in changes:
        assert recipe(spec.model_copy(update={"data": spec.data.model_copy(update=change)})) != first_recipe
    manifest = read_data_manifest(spec.data.prepared)
    assert manifest.model_dump()["encoder"] == {"codebook_sha256": None, "classes_sha256": None}
    assert manifest.tokenizer_sha256 == describe_file(spec.data.prepared / "tokenizer.json").sha256
