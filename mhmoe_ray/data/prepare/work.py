"""The folder that a preparation works in until it is whole, and giving it its name.

It lies beside the prepared folder and is named by the settings, so that a job that was killed finds what it had made,
and other settings do not. Two jobs may work in it at once: all that they write is the same, each file in one step.
"""

import errno
import hashlib
import json
import shutil
from pathlib import Path

from mhmoe_ray.data.shards.manifest import DataManifest, recipe
from mhmoe_ray.spec import RunSpec

KEPT = {"tokenizer.json", "quarantine.jsonl", "manifest.json"}
"""Beside the shards, what a prepared folder has."""


def work_folder(spec: RunSpec) -> Path:
    digest = hashlib.sha256(json.dumps(recipe(spec), sort_keys=True).encode()).hexdigest()
    return spec.data.prepared.with_name(f"{spec.data.prepared.name}.partial-{digest[:8]}")


def publish(work: Path, folder: Path, manifest: DataManifest) -> None:
    """Rid the work folder of all but the result and give it its name, unless another job was first."""
    shards = {s.file for d in manifest.domains.values() for s in d.shards} | {s.file for s in manifest.validation}
    for path in sorted(work.rglob("*"), reverse=True):
        name = str(path.relative_to(work))
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif name not in shards | KEPT:
            path.unlink()
    try:
        work.rename(folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
