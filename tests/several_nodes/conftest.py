import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.local import start_local, stop_local
from mhmoe_ray.cluster.spawn import MARK
from tests.conftest import home_of_its_own
from tests.data.texts import write_corpus
from tests.several_nodes.nodes import SETTINGS, Nodes


@contextmanager
def cluster_of_nodes(home: Path, user_home: Path) -> Iterator[Nodes]:
    """Start a cluster of a head and four nodes; its users name it by its address, since it is not their local one.

    Args:
        home: The MHMOE_HOME in which the cluster is started.
        user_home: The MHMOE_HOME of its users.
    """
    with home_of_its_own(home) as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        head = start_local(1)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tokens.token_file())}
        patch.setenv("MHMOE_HOME", str(user_home))
        environment = {**os.environ, **token, MARK: str(head.folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    cluster = Nodes(head, environment)
    try:
        cluster.bring_back()
        yield cluster
    finally:
        cluster.stop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MHMOE_HOME", str(home))
            stop_local()


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Yield the cluster that the tests of this folder share."""
    with cluster_of_nodes(tmp_path_factory.mktemp("several"), tmp_path_factory.mktemp("elsewhere")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with raw text below raw/."""
    folder = tmp_path_factory.mktemp("project")
    write_corpus(folder / "raw")
    return folder
