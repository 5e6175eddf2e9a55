"""Prepared folders, sound and damaged, and the reports of their verification."""

import shutil

from mhmoe_ray.data.shards.manifest import Shard
from mhmoe_ray.storage import describe_file
from tests.data.shards.manifests import make_manifest


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
