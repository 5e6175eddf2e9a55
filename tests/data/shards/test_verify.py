import shutil

from mhmoe_ray.data.shards.files import problem_with
from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.storage import describe_file
from tests.data.shards.manifests import manifest_of
from tests.data.shards.verify_by_tasks import problem_of


def test_a_file_is_what_was_written_or_the_problem_is_told(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("one")
    sha256 = describe_file(path).sha256
    assert problem_with(path, sha256) is None
    path.write_text("two")
    assert problem_with(path, sha256) == "its content is not what was written"
    path.unlink()
    assert problem_with(path, sha256) == "it is missing"


def make_folders(folder):
    """Write a sound folder, one with another shard in place of its second one, and one without held-out samples."""
    sound, other, lost = (folder / name for name in ("sound", "other", "lost"))
    manifest = manifest_of({"book": 2})
    shards = []
    for i, file in enumerate(["train/book/00000.arrow", "train/book/00001.arrow", "validation/00000.arrow"]):
        (sound / file).parent.mkdir(parents=True, exist_ok=True)
        (sound / file).write_text(f"shard {i}")
        shards.append(Shard(file=file, rows=1, sha256=describe_file(sound / file).sha256))
    manifest.domains["book"].shards, manifest.validation = shards[:2], shards[2:]
    (sound / "tokenizer.json").write_text("{}")
    manifest.tokenizer_sha256 = describe_file(sound / "tokenizer.json").sha256
    (sound / "manifest.json").write_text(manifest.model_dump_json())
    shutil.copytree(sound, other)
    shutil.copy(sound / shards[0].file, other / shards[1].file)
    shutil.copytree(sound, lost)
    (lost / shards[2].file).unlink()
    return sound, other, lost


def told(folders):
    """Return the expected report on each folder; in `tests/data/prepare/test_prepare.py` tasks of a cluster report the
    same."""
    _, other, lost = folders
    return [
        "sound",
        f"prepared file {other}/train/book/00001.arrow: its content is not what was written; remove {other} and "
        "prepare again",
        f"prepared file {lost}/validation/00000.arrow: it is missing; remove {lost} and prepare again",
    ]


def test_what_is_little_is_checked_here(tmp_path):
    folders = make_folders(tmp_path)
    assert [problem_of(folder) for folder in folders] == told(folders)
