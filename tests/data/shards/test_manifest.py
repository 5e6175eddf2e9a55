"""Tests of the recipe and of the data digest of a prepared folder."""

import json
import shutil

import pytest

from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE
from mhmoe_ray.data.shards.manifest import ChatData, data_digest, read_data_manifest, require_matching_data
from mhmoe_ray.data.shards.recipe import check_recipe, prepared_key, recipe
from mhmoe_ray.data.sources.find import find_files, fingerprints
from mhmoe_ray.errors import DataError
from tests.data.shards.manifests import make_manifest
from tests.data.texts import write_corpus
from tests.support.specs import tiny_spec


def test_recipe_identifies_a_tokenizer_by_its_content(tmp_path):
    (tmp_path / "t.json").write_text("one")
    spec = tiny_spec(tmp_path, data={"tokenizer": "t.json"})
    manifest = make_manifest({}, recipe(spec))
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
def test_check_recipe_rejects_other_tokenizer_settings(tmp_path, keys, message):
    manifest = make_manifest({}, recipe(tiny_spec(tmp_path)))
    check_recipe(tmp_path, manifest, tiny_spec(tmp_path, data={"tokenizer_model": "bpe", "tokenizer_train_mb": 20}))
    with pytest.raises(DataError, match=message):
        check_recipe(tmp_path, manifest, tiny_spec(tmp_path, data=keys))


def test_recipe_identifies_a_chat_template_by_its_content(tmp_path):
    def spec(**keys):
        data = {"sources": {"talk": {"path": "raw", "format": "chat"}}, "packing": "best_fit", **keys}
        return tiny_spec(tmp_path, model={"document_masks": True}, data=data)

    assert "chat_template" not in recipe(tiny_spec(tmp_path))
    manifest = make_manifest({}, recipe(spec()))
    (tmp_path / "own.jinja").write_text(BUILT_IN_TEMPLATE)
    check_recipe(tmp_path, manifest, spec(chat_template="own.jinja"))
    (tmp_path / "own.jinja").write_text("other")
    with pytest.raises(DataError, match=r"it was made with chat_template = a template of SHA-256 \w+, and the"):
        check_recipe(tmp_path, manifest, spec(chat_template="own.jinja"))
    (tmp_path / "own.jinja").unlink()
    with pytest.raises(DataError, match=r"chat template .*own\.jinja: No such file"):
        recipe(spec(chat_template="own.jinja"))
    # Runs of a sweep share a preparation if they name the same file, which need not be readable.
    assert prepared_key(spec(chat_template="own.jinja")) != prepared_key(spec()) == prepared_key(spec())


def test_manifest_of_conversations_can_be_read_again(tmp_path):
    manifest = make_manifest({"talk/en": 3})
    manifest.domains["talk/en"].target_tokens = 12
    manifest.chat = ChatData(template_sha256="a", start_token=0, turn_ends=[0])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")))
    assert read_data_manifest(tmp_path) == manifest
    assert (
        make_manifest({"web/a": 1}).model_dump(exclude={"recipe"}).keys()
        == manifest.model_dump(exclude={"recipe", "chat"}).keys()
    )


def test_unreadable_manifest_is_reported_without_advice_to_remove_it(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)") as error:
        read_data_manifest(tmp_path)
    assert "remove" not in str(error.value)


def test_folder_without_a_valid_manifest_is_reported(tmp_path):
    assert read_data_manifest(tmp_path / "nowhere") is None
    with pytest.raises(DataError, match=r"it has no manifest\.json; set data\.prepared to another folder"):
        read_data_manifest(tmp_path)
    for content in ('{"recipe": {', "{}", "\xff"):
        (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=r"is damaged, or from another version; set data\.prepared"):
            read_data_manifest(tmp_path)


def test_require_matching_data_rejects_other_data(tmp_path):
    (tmp_path / "manifest.json").write_text('{"recipe": 1}')
    digest = data_digest(tmp_path)
    require_matching_data(digest, tmp_path, "or submit a new run")
    (tmp_path / "manifest.json").write_text('{"recipe": 2}')
    with pytest.raises(
        DataError, match=r"it is not what .* was trained on; restore the folder .*, or submit a new run"
    ):
        require_matching_data(digest, tmp_path, "or submit a new run")


def test_check_recipe_accepts_moved_text_and_rejects_other_text(tmp_path):
    write_corpus(tmp_path / "old/raw")
    spec = tiny_spec(tmp_path / "old")
    source_hashes = fingerprints(spec.data, find_files(spec.data))
    manifest = make_manifest({}, recipe(spec)).model_copy(update={"fingerprints": source_hashes})
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    moved_spec = tiny_spec(tmp_path / "new")
    check_recipe(tmp_path, manifest, moved_spec)
    # A folder that an earlier version prepared has no fingerprints, so moved text cannot be recognized.
    with pytest.raises(DataError, match="it was made with sources = "):
        check_recipe(tmp_path, manifest.model_copy(update={"fingerprints": {}}), moved_spec)

    file = next((tmp_path / "new/raw").rglob("*.jsonl"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"it was made with sources = .*old/raw.*, and the spec says .*new/raw"):
        check_recipe(tmp_path, manifest, moved_spec)
    check_recipe(tmp_path, manifest, spec)
    # With the original spec the paths of the sources are equal, so the text is not compared and may be gone.
    shutil.rmtree(tmp_path / "old/raw")
    check_recipe(tmp_path, manifest, spec)


def test_data_digest_depends_on_content_and_not_on_paths(tmp_path):
    def digest(path, fingerprint, seq_len=16):
        manifest = {"recipe": {"sources": {"web": path}, "seq_len": seq_len}, "fingerprints": {"web": fingerprint}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return data_digest(tmp_path)

    assert digest("/old/raw", "one") == digest("/new/raw", "one")
    assert len({digest("/old/raw", "one"), digest("/old/raw", "two"), digest("/old/raw", "one", 32)}) == 3
