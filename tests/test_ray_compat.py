"""Tests that private names of Ray are used only as ray_compat.py declares, and that changes of Ray become one line."""

import ast
import re
from pathlib import Path

import pytest
import ray
import ray.data
import ray.train

from mhmoe_ray import ray_compat
from mhmoe_ray.errors import ClusterError

PACKAGE = Path(ray_compat.__file__).parent
PRIVATE_MODULE = re.compile(r"ray\.(.*\._|_|dashboard\b|train\.v2\b)")


@pytest.mark.filterwarnings("error")
def test_installed_ray_has_all_private_names():
    ray_compat.check_private_names()


def test_a_name_outside_the_table_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute nothing"):
        ray_compat.nothing  # noqa: B018 - the access is what is tested


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"module": "ray._private.stat"}, r"No module named 'ray\._private\.stat'"),
        ({"module": "ray.train"}, r"module 'ray\.train' has no attribute 'ElasticScalingPolicy'"),
        ({"parameters": "scaling_config pace"}, r"\.ElasticScalingPolicy has no parameter pace"),
        ({"members": {"_pause": ""}}, r"\.ElasticScalingPolicy has no _pause"),
        ({"members": {"_count_possible_workers": "n"}}, r"\._count_possible_workers has no parameter n"),
    ],
)
def test_interface_that_ray_changed_is_one_line(changes, difference, monkeypatch):
    entry = ray_compat.PRIVATE_NAMES["ElasticScalingPolicy"]._replace(**changes)
    monkeypatch.setitem(ray_compat.PRIVATE_NAMES, "ElasticScalingPolicy", entry)
    expected = rf"^Ray {re.escape(ray.__version__)}: train/resilience\.py needs .*{difference}; pip install 'ray==2\.60"
    for use in (lambda: ray_compat.ElasticScalingPolicy, ray_compat.check_private_names):
        with pytest.raises(ClusterError, match=expected):
            use()


@pytest.fixture(scope="module")
def private_members():
    """Private members of Ray's public classes and of those in the table, apart from the declared ones."""
    values = [getattr(ray_compat, name) for name in ray_compat.PRIVATE_NAMES]
    values += [value for module in (ray.train, ray.data) for value in vars(module).values()]
    members = {member for value in values if isinstance(value, type) for member in dir(value)}
    declared = {member for entry in ray_compat.PRIVATE_NAMES.values() for member in entry.members}
    return {m for m in members - declared if m.startswith(("_", "iter_internal_")) and not m.startswith("__")}


def private_uses(source, private_members):
    """Return the undeclared private names of Ray that Python code imports, uses or overrides."""
    tree = list(ast.walk(ast.parse(source)))
    sources = [node for node in tree if isinstance(node, ast.ImportFrom)]
    imports = [f"{node.module}.{alias.name}" for node in sources for alias in node.names]
    imports += [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
    attributes = [node for node in tree if isinstance(node, ast.Attribute)]
    texts = [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    modules = {name for name in [*imports, *map(ast.unparse, attributes), *texts] if PRIVATE_MODULE.match(name)}
    used_names = {node.attr for node in attributes} | set(texts)
    defined_names = {node.name for node in tree if isinstance(node, ast.FunctionDef)}
    defined_names |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    # Where a class may have a base of Ray, a definition overrides Ray's member. Elsewhere it is another one of ours.
    has_bases = any(name.startswith("mhmoe_ray.ray_compat.") for name in imports)
    members = private_members & (used_names | defined_names if has_bases else used_names - defined_names)
    return modules | members


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("from ray._private import state", "ray._private.state"),
        ("from ray.util import _inspect", "ray.util._inspect"),
        ("import ray.dashboard.utils", "ray.dashboard.utils"),
        ("import ray\nray._raylet", "ray._raylet"),
        ("import_module('ray.train.v2.api.config')", "ray.train.v2.api.config"),
        ("config._resources_per_worker_not_none", "_resources_per_worker_not_none"),
        ("getattr(dataset, '_get_uuid')", "_get_uuid"),
        ("from mhmoe_ray.ray_compat import A\nclass B(A):\n def _get_train_loop(self): 0", None),
        ("from mhmoe_ray.ray_compat import A\nclass B(A):\n def _validate_configs(self): 0", "_validate_configs"),
        ("class B:\n def _validate_configs(self): 0", None),
    ],
)
def test_private_uses_are_found(source, use, private_members):
    assert private_uses(source, private_members) == ({use} if use else set())


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_other_files_use_only_declared_private_names(private_members):
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    uses = {name: names for name, source in sources.items() if (names := private_uses(source, private_members))}
    assert uses.keys() == {"ray_compat.py"}, uses
