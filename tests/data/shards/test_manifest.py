"""What a prepared folder was made with, and what lies in it now."""

import pytest

from mhmoe_ray.data.shards.manifest import check_recipe, data_digest, read_data_manifest, recipe, require_data_of
from mhmoe_ray.errors import DataError
from tests.data.shards.manifests import manifest_of
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
    (tmp_path / "manifest.json").write_text("one")
    trained_on = data_digest(tmp_path)
    require_data_of(trained_on, tmp_path, "or submit a new run")
    (tmp_path / "manifest.json").write_text("another")
    with pytest.raises(
        DataError, match=r"it is not what .* was trained on; restore the folder .*, or submit a new run"
    ):
        require_data_of(trained_on, tmp_path, "or submit a new run")
