"""Reports on prepared folders, which are verified in this process or, like large folders, by Ray tasks."""

from pathlib import Path

from mhmoe_ray.data.shards import verify
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.errors import DataError


def verification_report(folder: Path) -> str:
    """Return the first problem of a prepared folder, or "sound" if it has none."""
    manifest = read_data_manifest(folder)
    assert manifest is not None
    try:
        verify.verify_shards(folder, manifest)
    except DataError as e:
        return str(e)
    return "sound"


def verification_report_by_tasks(folder: Path) -> str:
    """Verify a prepared folder by tasks of a running Ray; return its first problem, or "sound" if it has none.

    All later verifications of this process use tasks, too.
    """
    # With this limit, every folder counts as too large to be verified in this process.
    verify.LOCAL_CHECK_BYTES = 0
    return verification_report(folder)
