import pytest

from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.spawn import free_ports
from tests.cli.conftest import corpus

__all__ = ["corpus"]


@pytest.fixture
def connection(local_cluster):
    """Return a connection to the running local cluster."""
    return connect()


@pytest.fixture(scope="module")
def port():
    """Return a free port, the same for all tests of a file."""
    return free_ports(1)[0]
