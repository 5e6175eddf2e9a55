import shutil

from mhmoe_ray.data.shards.files import file_problem
from mhmoe_ray.data.shards.manifest import TEMPLATE_FILE, ChatData, Shard, read_data_manifest
from mhmoe_ray.storage import describe_file
from tests.data.shards.manifests import make_manifest
from tests.data.shards.verify_by_tasks import verification_report


def test_file_problem_reports_wrong_and_missing_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("one")
    sha256 = describe_file(path).sha256
    assert file_problem(path, sha256) is None
    path.write_text("two")
    assert file_problem(path, sha256) == "its content is not what was written"
    path.unlink()
    assert file_problem(path, sha256) == "it is missing"


def make_folders(folder):
    """Write and return three prepared folders: sound, with a wrong second shard, and without its held-out samples."""
    sound_folder, wrong_shard_folder, missing_file_folder = (folder / name for name in ("sound", "other", "lost"))
    manifest = make_manifest({"book": 2})
    shards = []
    for i, file in enumerate(["train/book/00000.arrow", "train/book/00001.arrow", "validation/00000.arrow"]):
        (sound_folder / file).parent.mkdir(parents=True, exist_ok=True)
        (sound_folder / file).write_text(f"shard {i}")
        shards.append(Shard(file=file, rows=1, sha256=describe_file(sound_folder / file).sha256))
    manifest.domains["book"].shards, manifest.validation = shards[:2], shards[2:]
    (sound_folder / "tokenizer.json").write_text("{}")
    manifest.tokenizer_sha256 = describe_file(sound_folder / "tokenizer.json").sha256
    (sound_folder / "manifest.json").write_text(manifest.model_dump_json())
    shutil.copytree(sound_folder, wrong_shard_folder)
    shutil.copy(sound_folder / shards[0].file, wrong_shard_folder / shards[1].file)
    shutil.copytree(sound_folder, missing_file_folder)
    (missing_file_folder / shards[2].file).unlink()
    return sound_folder, wrong_shard_folder, missing_file_folder


def expected_reports(folders):
    """Return the expected `verification_report` of each folder that `make_folders` returns."""
    _, wrong_shard_folder, missing_file_folder = folders
    return [
        "sound",
        f"prepared file {wrong_shard_folder}/train/book/00001.arrow: its content is not what was written; "
        f"remove {wrong_shard_folder} and prepare again",
        f"prepared file {missing_file_folder}/validation/00000.arrow: it is missing; "
        f"remove {missing_file_folder} and prepare again",
    ]


def test_verify_shards_reports_the_first_problem(tmp_path):
    folders = make_folders(tmp_path)
    assert [verification_report(folder) for folder in folders] == expected_reports(folders)


def test_verify_shards_checks_the_chat_template(tmp_path):
    folder, *_ = make_folders(tmp_path)
    (folder / TEMPLATE_FILE).write_text("one")
    manifest = read_data_manifest(folder)
    template_hash = describe_file(folder / TEMPLATE_FILE).sha256
    manifest.chat = ChatData(template_sha256=template_hash, start_token=0, turn_ends=[0])
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    assert verification_report(folder) == "sound"
    (folder / TEMPLATE_FILE).write_text("two")
    assert "chat_template.jinja: its content is not what was written" in verification_report(folder)
