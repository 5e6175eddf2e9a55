"""Tests of the errors of tasks of the preparation, as users see them."""

import errno
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from mhmoe_ray.data.prepare.pipeline import _errors_of_tasks
from mhmoe_ray.errors import DataError, StorageError

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
BAD_DATA = DataError("parts x", "a part is damaged", "remove that folder of parts and prepare again")


def task_error(cause: Exception) -> RayTaskError:
    """Return the error that Ray raises in the process that waits for a failed task."""
    return RayTaskError("make_shard", "ray::make_shard() Traceback\n  File x", cause).as_instanceof_cause()


@pytest.mark.parametrize("error", [FULL_DISK, task_error(FULL_DISK), task_error(task_error(FULL_DISK))])
def test_a_full_disk_is_one_line(error):
    expected = "data prepared: No space left on device; make room or repair the storage, then give the command again"
    with pytest.raises(StorageError) as raised, _errors_of_tasks(Path("prepared")):
        raise error
    assert str(raised.value) == expected


def test_an_error_of_this_package_is_raised_as_it_is():
    with pytest.raises(DataError) as raised, _errors_of_tasks(Path("prepared")):
        raise task_error(BAD_DATA)
    assert str(raised.value) == str(BAD_DATA)


def test_a_defect_of_a_task_stays_loud():
    with pytest.raises(RayTaskError, match="Traceback"), _errors_of_tasks(Path("prepared")):
        raise task_error(KeyError("a defect"))
