import pytest

from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.spawn import free_ports


@pytest.fixture
def connection(local_cluster):
    return connect()


@pytest.fixture(scope="module")
def port():
    return free_ports(1)[0]
