import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.local import start_local, stop_local
from mhmoe_ray.remote import LOCAL_CLUSTER
from tests.conftest import isolated_home
from tests.data.texts import write_corpus
from tests.several_nodes.nodes import SETTINGS, Nodes


@contextmanager
def cluster_of_nodes(home: Path, user_home: Path) -> Iterator[Nodes]:
    """Run a cluster of a head and eight nodes during the block, and yield it.

    Its users have another MHMOE_HOME than the one that it is started with. So it is not their local cluster, and they
    have to name its address.

    Args:
        home: The MHMOE_HOME that the head is started and stopped with.
        user_home: The MHMOE_HOME of the users, in the environment of the yielded cluster.
    """
    with isolated_home(home) as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        head = start_local(1)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tokens.token_file())}
        patch.setenv("MHMOE_HOME", str(user_home))
        environment = {**os.environ, **token, LOCAL_CLUSTER: str(head.folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
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
    """Yield the cluster of several nodes that the tests of this folder share."""
    with cluster_of_nodes(tmp_path_factory.mktemp("several"), tmp_path_factory.mktemp("elsewhere")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project folder with raw text below raw/."""
    folder = tmp_path_factory.mktemp("project")
    write_corpus(folder / "raw")
    return folder
