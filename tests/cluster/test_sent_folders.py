"""Tests of the files that are sent to a cluster, compared with those that Ray packs."""

import zipfile

import pytest

from mhmoe_ray.cluster.packages import check_size, sent_folders, with_packages
from mhmoe_ray.errors import SpecError


@pytest.fixture
def project(tmp_path):
    """Return a folder with code, and with caches, data and other files that are excluded in several ways."""
    for path, size in {
        "code.py": 100,
        "pkg/a.py": 200,
        "pkg/__pycache__/a.pyc": 10_000,
        "pkg/deep/b.py": 50,
        ".git/objects/x": 100_000,
        ".venv/lib/big": 100_000,
        "data/text": 70_000,
        "notes.md": 60,
        "secret.key": 9,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("data/\n")
    (tmp_path / "pkg/.rayignore").write_text("deep\n")
    return tmp_path


def test_sent_folders_are_exactly_what_ray_packs(project, tmp_path_factory):
    from ray._private.runtime_env.packaging import create_package

    env = with_packages({"working_dir": str(project), "excludes": ["*.md", "/secret.key"]})
    folders = sent_folders(env)
    assert [s.folder.name for s in folders] == [project.name, "mhmoe_ray", "mhmoe_kernels"]
    assert folders[0].parts == {"pkg": 205, "code.py": 100, ".gitignore": 6}
    target = tmp_path_factory.mktemp("packed") / "out.zip"
    create_package(str(project), target, include_gitignore=True, excludes=env["excludes"])
    packed = [f for f in zipfile.ZipFile(target).infolist() if not f.is_dir()]
    assert sum(f.file_size for f in packed) == folders[0].size
    assert all("__pycache__" not in part for s in folders[1:] for part in s.parts)
    assert 0 < sum(s.size for s in folders[1:]) < 5e6


def test_folder_that_is_too_large_is_refused_with_its_largest_parts(project):
    with (project / "weights.bin").open("wb") as f:
        f.truncate(700_000_000)
    with pytest.raises(
        SpecError, match=r"has 700\.\d MB, and Ray sends at most 5\d\d\.\d MB; largest: weights.bin 700"
    ):
        check_size({"working_dir": str(project), "excludes": [".git", ".venv"]})
    check_size({"working_dir": str(project), "excludes": [".git", ".venv", "*.bin"]})
    check_size({"working_dir": "s3://bucket/code.zip"})
    check_size({})
