"""Files that are sent to a cluster with a job: our packages, and the folders of its runtime environment."""

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mhmoe_ray.errors import SpecError

EXCLUDED_PATTERNS = (
    ".git",
    ".hg",
    ".venv",
    "venv",
    "node_modules",
    "__pycache__",
    ".*_cache",
    "*.egg-info",
    "wandb",
    "mlruns",
)
"""Patterns in the syntax of .gitignore for files that no job needs; .gitignore and .rayignore files apply as well."""
SHOWN_PARTS = 5
"""Largest number of parts to name in an error about a folder that is too large to send."""


class SentFolder(NamedTuple):
    """A folder of this machine that Ray uploads with a job."""

    folder: Path
    parts: dict[str, int]
    """Bytes of each file or folder that lies directly in `folder`, the largest first."""

    @property
    def size(self) -> int:
        return sum(self.parts.values())


def sent_folders(runtime_env: Mapping[str, Any]) -> list[SentFolder]:
    """Return the folders of this machine that Ray would send with a runtime environment, without excluded files."""
    excludes = list(runtime_env.get("excludes", []))
    modules = [runtime_env.get("working_dir"), *runtime_env.get("py_modules", [])]
    folders = [Path(p) for p in modules if isinstance(p, str) and "://" not in p and Path(p).is_dir()]
    return [SentFolder(folder, _sizes(folder, excludes)) for folder in folders]


def check_size(runtime_env: Mapping[str, Any]) -> None:
    """Raise a SpecError if the runtime environment sends a folder too large for Ray; it names the largest parts."""
    from mhmoe_ray.ray_compat import GCS_STORAGE_MAX_SIZE

    for sent_folder in sent_folders(runtime_env):
        if sent_folder.size > GCS_STORAGE_MAX_SIZE:
            largest_parts = list(sent_folder.parts.items())[:SHOWN_PARTS]
            part_list = ", ".join(f"{name} {_format_megabytes(size)}" for name, size in largest_parts)
            size, limit = _format_megabytes(sent_folder.size), _format_megabytes(GCS_STORAGE_MAX_SIZE)
            reason = f"{sent_folder.folder} has {size}, and Ray sends at most {limit}; largest: {part_list}"
            fix = "leave things out by `excludes` of cluster.runtime_env or a .rayignore, or name a smaller folder"
            raise SpecError("cluster.runtime_env", reason, fix)


def _sizes(folder: Path, excludes: list[str]) -> dict[str, int]:
    from mhmoe_ray.ray_compat import _get_excludes

    count: Counter[str] = Counter()
    for path in _files(folder, [_get_excludes(folder, excludes)]):
        count[path.relative_to(folder).parts[0]] += path.stat().st_size
    return dict(count.most_common())


def _files(folder: Path, predicates: list[Any]) -> Iterator[Path]:
    """Yield the files below a folder, except those that one of the predicates or an ignore file excludes."""
    from mhmoe_ray.ray_compat import get_excludes_from_ignore_files

    # Ray logs a message about each folder that has a .gitignore or .rayignore file.
    silent_logger = logging.Logger("silent", logging.ERROR)
    predicates = predicates + get_excludes_from_ignore_files(folder, include_gitignore=True, logger=silent_logger)
    for path in sorted(folder.iterdir()):
        if any(is_excluded(path) for is_excluded in predicates):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path, predicates)
        elif path.is_file():
            yield path


def _format_megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


PACKAGES = ("mhmoe_ray", "mhmoe_kernels")


def with_packages(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """Return the environment with our packages and `EXCLUDED_PATTERNS`, for a cluster without our packages."""
    folders = []
    for package in PACKAGES:
        module_spec = importlib.util.find_spec(package)
        assert module_spec is not None
        assert module_spec.origin is not None
        folders.append(str(Path(module_spec.origin).parent))
    modules = [*runtime_env.get("py_modules", []), *folders]
    excludes = [*runtime_env.get("excludes", []), *EXCLUDED_PATTERNS]
    return {**runtime_env, "py_modules": modules, "excludes": excludes}
