"""Metrics of a run in Weights & Biases, if the spec asks for it (`tracking.wandb`).

The id of the run there is that of the run here. Offline, the files are in the folder `wandb` of the run directory, for
`wandb sync`. Each worker group writes a new file with all steps, because W&B cannot continue an offline file.
"""

import logging
import netrc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import describe_tags, tagged_values
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, copy_file, remove_tree
from mhmoe_ray.train.telemetry.tracker import EndStatus, Row, TrackingError

if TYPE_CHECKING:
    import wandb

LOAD_BINS = 32


class WandbServer:
    """Connection of a run to Weights & Biases, or its files for a later `wandb sync`."""

    name = "Weights & Biases"

    def __init__(self, run: RunDir, spec: RunSpec) -> None:
        """Check the package and, online, the key; if one is missing, raise a JobError."""
        if find_spec("wandb") is None:
            fix = "install mhmoe-ray[wandb] where workers run, or remove the key"
            raise JobError("tracking.wandb", "wandb is not installed there", fix)
        if spec.tracking.wandb == "online" and not _has_key():
            fix = "set WANDB_API_KEY where workers run, or tracking.wandb to offline"
            raise JobError("tracking.wandb", "no key of Weights & Biases was found there", fix)
        # The package would log settings and links at the level INFO.
        logging.getLogger("wandb").setLevel(logging.WARNING)
        self._run, self._spec = run, spec
        self._is_offline = spec.tracking.wandb == "offline"
        self._folder = run.path / "wandb"
        # W&B writes to local folders only.
        self._spool = None if isinstance(run.path, Path) else tempfile.TemporaryDirectory(prefix="mhmoe-")
        self._wandb_run: wandb.Run | None = None

    def connect(self) -> int:
        """Open the run, or replace the files of earlier worker groups by a new one, which has no steps yet."""
        with _one_line_errors():
            import wandb

            if self._is_offline:
                for folder in [*self._folder.glob("offline-run-*")]:
                    remove_tree(folder)
            tracking = self._spec.tracking
            self._wandb_run = wandb.init(
                project=tracking.experiment,
                id=self._run.id,
                name=self._run.id,
                group=tracking.group,
                notes=describe_tags(),
                config=self._spec.model_dump(mode="json"),
                dir=self._spool.name if self._spool else str(self._run.path),
                mode=tracking.wandb,
                resume="allow",
                reinit="create_new",
                # The run's own log has what its processes print. Code and requirements stay on the cluster.
                settings=wandb.Settings(
                    console="off", disable_git=True, save_code=False, x_save_requirements=False, silent=True
                ),
            )
            return self._wandb_run.starting_step

    def send(self, rows: list[Row]) -> None:
        """Log the metrics, and at a step with a validation a histogram of each layer's expert loads."""
        import wandb

        for line, loads_LE in rows:
            values: dict[str, Any] = {**tagged_values(line), "_timestamp": line[metrics.TIME]}
            if loads_LE is not None and metrics.VAL_LOSS in line:
                for layer, loads_E in enumerate(loads_LE):
                    histogram = np.histogram(loads_E, bins=LOAD_BINS)
                    values[f"expert_load/layer_{layer}"] = wandb.Histogram(np_histogram=histogram)
            with _one_line_errors():
                self._opened_run.log(values, step=line[metrics.STEP], commit=True)

    def link_checkpoint(self, checkpoint: Location) -> None:
        """Show the folder in the run's summary."""
        with _one_line_errors():
            self._opened_run.summary["checkpoint"] = str(checkpoint)

    def end(self, end_status: EndStatus) -> None:
        """Send everything, with an exit code that W&B shows as finished or failed."""
        with _one_line_errors():
            import wandb

            self._opened_run.finish(exit_code=1 if end_status == "FAILED" else 0)
            # The service of the package writes the last records when it ends.
            wandb.teardown()
        if self._spool and self._is_offline:
            for file in Path(self._spool.name).glob("wandb/offline-run-*/*.wandb"):
                copy_file(file, self._folder / file.parent.name / file.name)
            self._spool.cleanup()

    @property
    def _opened_run(self) -> "wandb.Run":
        assert self._wandb_run
        return self._wandb_run


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except Exception as e:
        # The errors of W&B's package have no common base.
        raise TrackingError(f"{type(e).__name__} {e}".splitlines()[0]) from e


def open_server(run: RunDir, spec: RunSpec) -> WandbServer | None:
    """Return a run's connection to W&B; None if the spec does not ask for it."""
    return WandbServer(run, spec) if spec.tracking.wandb else None


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
