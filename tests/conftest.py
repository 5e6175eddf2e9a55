"""Options of pytest, and the Ray cluster that all tests of a lane share.

A lane is a worker process of pytest-xdist, or the only process of plain pytest.
"""

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
from mhmoe_ray.cluster.spawn import LocalCluster, free_ports
from mhmoe_ray.errors import ClusterError
from tests.cli.run import command
from tests.support.browser import browser
from tests.support.s3 import s3

__all__ = ["browser", "local_cluster", "s3"]

USER_CLUSTER_VARIABLES = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
)
"""Environment variables by which a user names a cluster or its token; tests remove them."""

LONGEST_FILES = {"test_quickstart.py", "test_vision_runs.py", "test_encoder_runs.py", "test_old_run.py"}
"""Names of the test files that take longest; lanes start with them."""

QUIET_SETTINGS = {
    # The autoscaler runs less often, because these clusters never scale. At Ray's default of 5 s it takes 2.5 per cent
    # of a core.
    "AUTOSCALER_UPDATE_INTERVAL_S": "60",
}
"""Environment variables that spare clusters work from which no test profits."""

# In the profile `house`, the examples are the same each time, so that only a change can make a test fail. One part
# varies: hypothesis also draws constants from those of our modules that the lane has imported by then. `make explore`
# draws new examples. There is no deadline, because a test may be slow on a busy machine.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)


try:
    if (_LEVEL := requested_level()) is not None:
        # Torch and its libraries read these variables at their first computation, so they have to be set now, before
        # it. The lanes, the processes that tests start and those of Ray inherit them.
        os.environ |= level_environment(_LEVEL)
except ValueError as error:
    raise pytest.UsageError(str(error)) from error


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = (
        "Run only quick tests that compute in this process: none that starts Ray, another process or a compiler."
    )
    parser.addoption("--fast", action="store_true", help=help_text)
    help_text = "Fork the workers of Ray from servers that have imported the large modules (ray_forks/worker_forks.py)."
    parser.addoption("--forks", action="store_true", help=help_text)


def skip_process_start(*_: object, **__: object) -> NoReturn:
    """Skip the current test; a stand-in for the functions that start a process."""
    pytest.skip("starts another process")


def pytest_configure(config: pytest.Config) -> None:
    """Set threads, ports, environment variables and warning filters of this lane, as the options say."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Each lane computes on one core. Processes that a lane starts may use more threads. Passive threads sleep while
        # they wait, so that they do not take the cores of other lanes.
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # A port is bound seconds after it was found free, and another lane could choose it in between. Therefore each
        # lane chooses among ports that no other lane uses.
        lane, lanes = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        spawn.PORTS = spawn.PORTS[lane::lanes]
    if config.getoption("--hypothesis-profile") is None:
        hypothesis.settings.load_profile("house")
    if not torch.cuda.is_available():
        # Triton reads this variable when it is first imported, and in some tests torch imports it, so it is set before
        # any test.
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("--forks") and "PYTEST_XDIST_WORKER" not in os.environ:
        # Lanes inherit this path, and so do the processes that tests start: raylets, and workers from these.
        folders = [str(Path(__file__).parent / "ray_forks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    if config.getoption("--fast"):
        # Ignore warnings about unclosed pipes: a test that is skipped where it starts a process does not close the
        # pipes that it opened for that process.
        config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")
        config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")
    # When Ray's job client follows logs, it passes the deprecated ssl=None to aiohttp.
    config.addinivalue_line("filterwarnings", "ignore:ssl=None is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests of the files that take longest to the front, so that no worker of xdist runs one alone at the end.

    With `--fast`, remove the tests marked `ray` or `long`.
    """
    if config.getoption("--fast"):
        excluded_markers = ("ray", "long")
        items[:] = [item for item in items if not any(map(item.get_closest_marker, excluded_markers))]
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let every start of a process skip the test that starts it, if `--fast` is given."""
    if session.config.getoption("--fast"):
        # With this replacement there is no list of tests that start processes, which could become outdated. The
        # replacement is made after the collection, because plugins of pytest start processes before.
        subprocess.Popen.__init__ = skip_process_start
        multiprocessing.process.BaseProcess.start = skip_process_start


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch, so that fixtures draw the same numbers whatever tests their lane has run before."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Seed torch again after the fixtures, because some of them may have been set up for earlier tests."""
    torch.manual_seed(0)


class LaneScheduling(LoadFileScheduling):
    """Scheduler of pytest-xdist that runs all tests of a file, and all tests below one of `FOLDERS`, in one lane."""

    # Each lane that runs tests of one of these folders has clusters of its own for them. In several lanes, such
    # clusters would be too many for one machine.
    FOLDERS = ("tests/several_nodes/", "tests/faults/")

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in self.FOLDERS if nodeid.startswith(folder)), super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    return LaneScheduling(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the clusters that lanes have left running."""
    # After Ctrl-C a lane has ten seconds to end. Stopping Ray takes longer, so the process that started the lanes does
    # it.
    if getattr(config.option, "numprocesses", None):
        for record in config._tmp_path_factory.getbasetemp().rglob(RECORD):
            # A test records a cluster of another machine, which `stop_local` refuses to stop.
            with isolated_home(record.parent), suppress(ClusterError):
                stop_local()


@contextmanager
def isolated_home(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Set MHMOE_HOME to `home` and remove `USER_CLUSTER_VARIABLES` during the block.

    Yield the patch of the environment, which takes further changes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHMOE_HOME", str(home))
        for name, value in QUIET_SETTINGS.items():
            patch.setenv(name, value)
        for name in USER_CLUSTER_VARIABLES:
            patch.delenv(name, raising=False)
        # Jobs on clusters that we did not start run the first `python` on the PATH, which has to be the tests'
        # interpreter.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield patch


@pytest.fixture(scope="session")
def lane_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Set MHMOE_HOME to a new folder for the rest of the session, and yield that folder.

    A test that starts the local cluster leaves it running for later tests. At the end `mhmoe cluster down` stops it.
    """
    home = tmp_path_factory.mktemp("home")
    with isolated_home(home):
        yield home
        is_running = (home / RECORD).exists()
        shutdown = subprocess.run(command("cluster", "down"), capture_output=True, text=True)
        assert (shutdown.returncode, shutdown.stdout) == (0, "stopped\n" if is_running else "no local cluster ran\n"), (
            shutdown.stderr
        )
        assert not (home / RECORD).exists()


@pytest.fixture(scope="session")
def local_cluster(lane_home: Path) -> LocalCluster:
    """Return the running local cluster of the lane; start it with 8 logical CPUs if no test has started it before."""
    return start_local(8)


@pytest.fixture
def unused_port() -> int:
    """Return a port of this machine that is free now."""
    return free_ports(1)[0]
