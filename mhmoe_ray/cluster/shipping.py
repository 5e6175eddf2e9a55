"""What travels to a cluster with a job: our packages, and what the spec's runtime environment names."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mhmoe_ray.errors import SpecError

NEVER = (".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".*_cache", "*.egg-info", "wandb", "mlruns")
"""Patterns, as of a .gitignore, of what no job needs; beside .gitignore and .rayignore, which count too."""
SHOWN = 5


class Shipped(NamedTuple):
    folder: Path
    parts: dict[str, int]
    """Bytes of what lies directly in it, the largest first."""

    @property
    def size(self) -> int:
        return sum(self.parts.values())


def shipped(runtime_env: Mapping[str, Any]) -> list[Shipped]:
    """Folders of this machine that Ray would send, without what it leaves out."""
    excludes = list(runtime_env.get("excludes", []))
    places = [runtime_env.get("working_dir"), *runtime_env.get("py_modules", [])]
    folders = [Path(p) for p in places if isinstance(p, str) and "://" not in p and Path(p).is_dir()]
    return [Shipped(folder, _sizes(folder, excludes)) for folder in folders]


def check_size(runtime_env: Mapping[str, Any]) -> None:
    """Raises:
    SpecError: one of the folders that are sent is larger than Ray takes; the largest things in it are named.
    """
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    for found in shipped(runtime_env):
        if found.size > GCS_STORAGE_MAX_SIZE:
            largest = ", ".join(f"{name} {_mb(each)}" for name, each in list(found.parts.items())[:SHOWN])
            sizes = f"{_mb(found.size)}, and Ray sends at most {_mb(GCS_STORAGE_MAX_SIZE)}"
            why = f"{found.folder} has {sizes}; largest: {largest}"
            fix = "leave things out by `excludes` of cluster.runtime_env or a .rayignore, or name a smaller folder"
            raise SpecError("cluster.runtime_env", why, fix)


def _sizes(folder: Path, excludes: list[str]) -> dict[str, int]:
    from ray._private.runtime_env.packaging import _get_excludes

    count: Counter[str] = Counter()
    for path in _files(folder, [_get_excludes(folder, excludes)]):
        count[path.relative_to(folder).parts[0]] += path.stat().st_size
    return dict(count.most_common())


def _files(folder: Path, left_out: list[Any]) -> Iterator[Path]:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    left_out = left_out + get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_Silent())
    for path in sorted(folder.iterdir()):
        if any(leaves_out(path) for leaves_out in left_out):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path, left_out)
        elif path.is_file():
            yield path


class _Silent:
    def info(self, *_: object) -> None:
        """Ray tells of each file of patterns."""


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
