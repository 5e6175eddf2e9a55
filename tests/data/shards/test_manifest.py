"""The recipe that a prepared folder was made with, and the data that it holds now."""

import json
import shutil

import pytest

from mhmoe_ray.data.shards.manifest import check_recipe, data_digest, read_data_manifest, recipe, require_data_of
from mhmoe_ray.data.sources.find import fingerprints
from mhmoe_ray.errors import DataError
from tests.data.shards.manifests import manifest_of
from tests.data.texts import write_corpus
from tests.specs import tiny_spec


def test_a_given_tokenizer_is_known_by_its_content(tmp_path):
    (tmp_path / "t.json").write_text("one")
    spec = tiny_spec(tmp_path, data={"tokenizer": "t.json"})
    manifest = manifest_of({}, recipe(spec))
    check_recipe(tmp_path, manifest, spec)

    (tmp_path / "elsewhere.json").write_text("one")
    check_recipe(tmp_path, manifest, tiny_spec(tmp_path, data={"tokenizer": "elsewhere.json"}))

    (tmp_path / "t.json").write_text("two")
    with pytest.raises(
        DataError, match=r"it was made with tokenizer = a file of SHA-256 7692c\w+, and the spec says a"
    ):
        check_recipe(tmp_path, manifest, spec)
    (tmp_path / "t.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer .*t\.json: No such file or directory; restore it"):
        check_recipe(tmp_path, manifest, spec)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer_model": "unigram"}, "made with tokenizer_model = bpe, and the spec says unigram"),
        ({"tokenizer_train_mb": 3}, "made with tokenizer_train_mb = 20.0, and the spec says 3.0"),
    ],
)
def test_another_way_to_train_one_is_another_folder(tmp_path, keys, message):
    manifest = manifest_of({}, recipe(tiny_spec(tmp_path)))
    check_recipe(tmp_path, manifest, tiny_spec(tmp_path, data={"tokenizer_model": "bpe", "tokenizer_train_mb": 20}))
    with pytest.raises(DataError, match=message):
        check_recipe(tmp_path, manifest, tiny_spec(tmp_path, data=keys))


def test_a_manifest_that_cannot_be_read_now_costs_nobody_the_folder(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)") as raised:
        read_data_manifest(tmp_path)
    assert "remove" not in str(raised.value)


def test_a_folder_without_a_whole_manifest_is_none_of_ours(tmp_path):
    assert read_data_manifest(tmp_path / "nowhere") is None
    with pytest.raises(DataError, match=r"it has no manifest\.json; set data\.prepared to another folder"):
        read_data_manifest(tmp_path)
    for content in ('{"recipe": {', "{}", "\xff"):
        (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=r"is damaged, or another version's; set data\.prepared"):
            read_data_manifest(tmp_path)


def test_a_checkpoint_counts_in_the_data_it_was_trained_on_and_no_other(tmp_path):
    (tmp_path / "manifest.json").write_text('{"recipe": 1}')
    trained_on = data_digest(tmp_path)
    require_data_of(trained_on, tmp_path, "or submit a new run")
    (tmp_path / "manifest.json").write_text('{"recipe": 2}')
    with pytest.raises(
        DataError, match=r"it is not what .* was trained on; restore the folder .*, or submit a new run"
    ):
        require_data_of(trained_on, tmp_path, "or submit a new run")


def test_text_that_was_moved_is_the_same_and_other_text_is_not(tmp_path):
    write_corpus(tmp_path / "old/raw")
    spec = tiny_spec(tmp_path / "old")
    manifest = manifest_of({}, recipe(spec)).model_copy(update={"fingerprints": fingerprints(spec.data)})
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    moved = tiny_spec(tmp_path / "new")
    check_recipe(tmp_path, manifest, moved)
    with pytest.raises(DataError, match="it was made with sources = "):  # a folder of an earlier version
        check_recipe(tmp_path, manifest.model_copy(update={"fingerprints": {}}), moved)

    file = next((tmp_path / "new/raw").rglob("*.jsonl"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"it was made with sources = .*old/raw.*, and the spec says .*new/raw"):
        check_recipe(tmp_path, manifest, moved)
    check_recipe(tmp_path, manifest, spec)
    shutil.rmtree(tmp_path / "old/raw")  # where it was made from, nothing needs the text any more
    check_recipe(tmp_path, manifest, spec)


def test_checkpoints_know_data_by_what_it_holds_and_not_by_where_its_text_lay(tmp_path):
    def digest(path, fingerprint, seq_len=16):
        manifest = {"recipe": {"sources": {"web": path}, "seq_len": seq_len}, "fingerprints": {"web": fingerprint}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return data_digest(tmp_path)

    assert digest("/old/raw", "one") == digest("/new/raw", "one")
    assert len({digest("/old/raw", "one"), digest("/old/raw", "two"), digest("/old/raw", "one", 32)}) == 3
