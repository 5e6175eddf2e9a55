"""The Ray cluster that all tests of a lane share, and the rule by which tests share a lane."""

import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from mhmoe_kernels.cpu import level_environment, requested_level
from mhmoe_ray.cluster import spawn
from mhmoe_ray.cluster.local import RECORD, start_local, stop_local
from mhmoe_ray.cluster.spawn import LocalCluster
from mhmoe_ray.errors import ClusterError
from tests.browser import browser
from tests.cli.run import command
from tests.s3 import s3

__all__ = ["browser", "local_cluster", "s3"]

OF_THE_USER = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

QUIET = {
    # Nothing scales here, and what asks whether anything should takes 2.5 per cent of a core at Ray's 5 s.
    "AUTOSCALER_UPDATE_INTERVAL_S": "60",
}
"""Environment variables that reduce work of a cluster from which no test profits."""

# The same examples each time, so that only a change can make a test fail; but for constants of our own modules, which
# hypothesis draws too, of those that a lane has imported by then. `make explore` draws new ones. No deadline: a busy
# machine is no failure.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)


try:
    if (_LEVEL := requested_level()) is not None:
        # Torch and its libraries read these when they first compute: here, which is not yet, in the lanes, in processes
        # that tests start, and in Ray's, all of which have the environment of this one.
        os.environ |= level_environment(_LEVEL)
except ValueError as error:
    raise pytest.UsageError(str(error)) from error


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "Only quick tests that compute in this process: none that starts Ray, another process or a compiler."
    parser.addoption("--fast", action="store_true", help=text)


def skip_who_starts_a_process(*_: object, **__: object) -> NoReturn:
    pytest.skip("starts another process")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A core for each lane; what it starts may compute with more threads, which do not spin while they wait.
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # A port is free when it is chosen, and taken seconds later: no other lane is to choose it meanwhile.
        lane, lanes = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        spawn.PORTS = spawn.PORTS[lane::lanes]
    if config.getoption("--hypothesis-profile") is None:
        hypothesis.settings.load_profile("house")
    if not torch.cuda.is_available():
        # Read when Triton is first imported, which torch does in some tests.
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("--fast"):
        # A test that ends where it starts a process leaves the pipes that it has opened for it.
        config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")
        config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")
    # Ray's job client passes ssl=None to aiohttp when it follows logs.
    config.addinivalue_line("filterwarnings", "ignore:ssl=None is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest file first, so that no lane is left alone with it at the end.

    `--fast` leaves out the tests marked `ray` or `long`.
    """
    if config.getoption("--fast"):
        left_out = ("ray", "long")
        items[:] = [item for item in items if not any(map(item.get_closest_marker, left_out))]
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--fast"):
        # A test ends where it starts a process: no list of such tests is needed, which could become wrong. Plugins of
        # pytest start some of their own before.
        subprocess.Popen.__init__ = skip_who_starts_a_process
        multiprocessing.process.BaseProcess.start = skip_who_starts_a_process


class Lanes(LoadFileScheduling):
    """Scheduler that keeps each test file, and each of these folders as a whole, in one lane.

    The clusters of a folder's files would be too many at the same time.
    """

    FOLDERS = ("tests/several_nodes/", "tests/faults/")

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in self.FOLDERS if nodeid.startswith(folder)), super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    return Lanes(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the clusters of lanes that were ended.

    A lane has ten seconds after Ctrl-C, and Ray needs more.
    """
    if getattr(config.option, "numprocesses", None):
        for record in config._tmp_path_factory.getbasetemp().rglob(RECORD):
            with home_of_its_own(record.parent), suppress(ClusterError):  # a test writes one of another machine
                stop_local()


@contextmanager
def home_of_its_own(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Set MHMOE_HOME, and remove everything that the user's environment says about clusters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHMOE_HOME", str(home))
        for name, value in QUIET.items():
            patch.setenv(name, value)
        for name in OF_THE_USER:
            patch.delenv(name, raising=False)
        # `python` in jobs, as sent to clusters that are not ours, is the one that runs the tests.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield patch


@pytest.fixture(scope="session")
def lane_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a home that MHMOE_HOME names for the rest of the session.

    A test that starts a cluster in it leaves the cluster to later tests; at the end it is stopped as users stop theirs.
    """
    home = tmp_path_factory.mktemp("home")
    with home_of_its_own(home):
        yield home
        runs = (home / RECORD).exists()
        shutdown = subprocess.run(command("cluster", "down"), capture_output=True, text=True)
        assert (shutdown.returncode, shutdown.stdout) == (0, "stopped\n" if runs else "no local cluster ran\n"), (
            shutdown.stderr
        )
        assert not (home / RECORD).exists()


@pytest.fixture(scope="session")
def local_cluster(lane_home: Path) -> LocalCluster:
    """Return the local cluster in that home, with 8 logical CPUs; it is the quickstart's where that ran before."""
    return start_local(8)
