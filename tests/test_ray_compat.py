"""Tests that only ray_compat.py uses private interfaces of Ray, and that the installed Ray has them all."""

import re
from pathlib import Path

import pytest

from mhmoe_ray import ray_compat

PACKAGE = Path(ray_compat.__file__).parent
PRIVATE = re.compile(r"\bray(\.\w+)*\._\w+|\bray\.dashboard\b|\biter_internal_\w+")


# Ray Serve defines fields in a way that pydantic will drop.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
@pytest.mark.parametrize("name", ray_compat.PRIVATE_NAMES)
def test_ray_has_the_name(name):
    assert getattr(ray_compat, name) is not None


def test_a_name_outside_the_table_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute nothing"):
        ray_compat.nothing  # noqa: B018 - the access is what is tested


def test_no_other_file_uses_private_modules():
    users = [path for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())]
    assert users == [PACKAGE / "ray_compat.py"]
