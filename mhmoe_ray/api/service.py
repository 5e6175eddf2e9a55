"""A model that a cluster serves over OpenAI's API: deploy a checkpoint, replace it by another, and stop serving."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf
from os import PathLike
from secrets import token_hex
from typing import Any, NamedTuple

from mhmoe_ray.api.adapters import find_adapters
from mhmoe_ray.api.checkpoints import Checkpoint, CheckpointName, path_text, pick_checkpoint
from mhmoe_ray.api.connection import connect_to_cluster
from mhmoe_ray.api.defaults import APPLICATION, OnNote, ignore_note
from mhmoe_ray.api.run import Run
from mhmoe_ray.api.serve_target import API_KEYS_VARIABLE, resolve_target, with_environment_keys
from mhmoe_ray.api.spec import Overrides, override_list
from mhmoe_ray.cluster import serving
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.serve_removal import remove
from mhmoe_ray.cluster.serving import Application
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.config import adapter_paths, application_config, set_adapters
from mhmoe_ray.serving.vllm.options import check_options
from mhmoe_ray.spec import RunSpec, ServeSpec
from mhmoe_ray.storage import Location, location
from mhmoe_ray.terminal import Activity

SERVE_CPUS = 1
"""Number of CPUs that a local cluster needs in addition to those of the replicas, for other processes."""
API_KEY_VARIABLE = "MHMOE_API_KEY"
APPLICATION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def serve(
    target: Run | Checkpoint | RunSpec | str | PathLike[str] | None = None,
    *,
    checkpoint: CheckpointName | None = None,
    overrides: Overrides = (),
    name: str = APPLICATION,
    storage: str | PathLike[str] | None = None,
    address: str | None = None,
    wait: bool = True,
    trust_run: bool = False,
    on_note: OnNote = ignore_note,
) -> "Service":
    """Serve a checkpoint over OpenAI's API on a cluster, in place of the application that has this name now.

    Without an address and a default cluster, a Ray cluster is started on this machine. The application stays when this
    process ends. Clients with keys in MHMOE_API_KEYS (NAME:KEY,NAME:KEY) or serve.keys may send requests; without
    either, everybody who reaches the port may.

    Args:
        target: a run, its id or its path; a spec or its file, whose newest run is served with the spec's settings; a
            checkpoint or its folder. None for the newest run.
        checkpoint: one of the run's checkpoints, its name or its step; None for the newest.
        overrides: keys of the spec to change: those of the section serve, such as `{"serve.port": 8001}`,
            cluster.shared_filesystem and cluster.runtime_env.
        name: name of the application. The one named mhmoe answers at /, all others at /NAME.
        storage: folder that holds run directories; by default that of a spec as target, else MHMOE_STORAGE, else
            `runs`.
        address: a Ray cluster: the URL of its dashboard, or its name; None for the default cluster.
        wait: whether to wait until the application answers requests.
        trust_run: whether to use `cluster.runtime_env`, `serve.host`, `serve.keys`, `serve.cors_origins` and
            `serve.vllm` of a run that somebody else submitted. By default they are ignored, with a note.
        on_note: callback that gets lines of text about the progress.

    Raises:
        RunError, CheckpointError: there is no such run or checkpoint, or the checkpoint is damaged.
        SpecError: the spec or an override is wrong, or the nodes cannot be expected to see the run directory.
        ClusterError: the cluster cannot be started or reached.
        ServeError: the name does not fit into a URL, Ray Serve does not accept the application or cannot listen at its
            address, or the application failed.
    """
    if APPLICATION_NAME.fullmatch(name) is None:
        reason = "the name is part of a URL, and may have letters, digits, dots, dashes and underscores"
        raise ServeError(f"application {name!r}", reason, "choose another name")
    run, path, spec = resolve_target(
        target,
        checkpoint,
        None if storage is None else path_text(storage),
        override_list(overrides),
        on_note,
        trust_run,
    )
    settings = with_environment_keys(spec.serve)
    check_options(settings.vllm)
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not settings.keys:
        on_note(
            f"warning: any client that reaches {settings.host}:{settings.port} may send requests; set serve.keys or "
            f"{API_KEYS_VARIABLE} to require a key"
        )
    # A local cluster cannot grow, so one that is started now must have room for the largest number of replicas.
    cpus = settings.replicas.max * settings.cpus_per_replica + SERVE_CPUS
    adapters = find_adapters(settings.adapters, path, run, settings)
    connection = connect_to_cluster(spec.cluster, [run.path], cpus, address, on_note)
    route_prefix = "/" if name == APPLICATION else f"/{name}"
    config = application_config(name, path, settings, run.id, route_prefix, spec.cluster.runtime_env, adapters)
    _deploy(connection, config, settings.host, settings.port, f"of {run.id}", on_note)
    service = Service(name, connection)
    if wait:
        service.wait(on_note=on_note)
    return service


def find_service(name: str = APPLICATION, address: str | None = None) -> "Service":
    """Return a service that this or another process has deployed.

    Args:
        name: name of the application.
        address: a Ray cluster: the URL of its dashboard, or its name; None for the default cluster.

    Raises:
        ClusterError: the cluster cannot be reached.
        ServeError: there is no such application, or it does not serve a checkpoint.
    """
    service = Service(name, connect(address))
    # This call raises an error for an application that does not serve a checkpoint; its result is not needed.
    serving.deployed_config(service.connection, name)
    return service


class ServiceUpdate(NamedTuple):
    """Result of the update of a service to another checkpoint."""

    checkpoint: str
    """Name of the checkpoint that is served after the update."""
    is_deployed: bool
    """Whether the update deployed the checkpoint. If not, the checkpoint was served already."""


@dataclass(frozen=True)
class Service:
    """Handle of an application on a cluster that serves a run's checkpoint; several processes may have one."""

    name: str
    connection: Connection = field(repr=False)

    @property
    def application(self) -> Application:
        """State of the application: URL, whether this machine can reach it, status, message and checkpoint.

        Raises:
            ServeError: the application is gone.
            ClusterError: the cluster does not answer.
        """
        return serving.find_application(self.connection, self.name)

    @property
    def url(self) -> str:
        """URL at which the service answers. Completions are at /v1/completions below this URL.

        Raises:
            ServeError: the application is gone.
            ClusterError: the cluster does not answer.
        """
        return self.application.url

    @property
    def checkpoint(self) -> Location:
        """Path of the checkpoint that the service serves or is deploying.

        Raises:
            ServeError: the application is gone, or its name now belongs to one that does not serve a checkpoint.
            ClusterError: the cluster does not answer.
        """
        return _checkpoint_of(self.application)

    def wait(self, timeout: float | None = None, on_note: OnNote = ignore_note) -> None:
        """Wait until the service answers requests. Ctrl-C ends the wait, not the deployment.

        Args:
            timeout: timeout in seconds, which counts only while the cluster answers; None to wait without a limit.
            on_note: callback that now and then gets a line of text about the progress.

        Raises:
            ServeError: the application failed, is gone, or does not run in time.
            ClusterError: the cluster gave no answer for too long.
        """
        serving.wait_until_running(self.connection, self.name, inf if timeout is None else timeout, say=on_note)

    def stats(self, key: str | None = None) -> dict[str, Any]:
        """Return the statistics of the service's replicas, as `mhmoe serve status --json` prints them.

        Args:
            key: API key, if the service asks for one; None for that of the environment variable MHMOE_API_KEY.

        Raises:
            ServeError: the application is gone, asks for a key, or cannot be reached from here.
            ClusterError: the cluster does not answer.
        """
        application = self.application
        # Applications that are not from this project must not see the API key, which is a secret.
        _checkpoint_of(application)
        key = key or os.environ.get(API_KEY_VARIABLE, "").strip() or None
        stats = serving.application_stats(application, key)
        if isinstance(stats, str):
            raise ServeError(f"application {self.name}", stats, "see `mhmoe serve status`")
        return stats

    def update(
        self, checkpoint: CheckpointName | None = None, *, wait: bool = True, on_note: OnNote = ignore_note
    ) -> ServiceUpdate:
        """Serve another checkpoint of the same run, by default the newest, without refusing a request.

        New replicas start before old ones end, so the cluster needs room for both, unless serve.surge is false. Old
        replicas finish the requests that they have begun. If the checkpoint is served already, nothing changes; if its
        deployment failed, it is tried again.

        Args:
            checkpoint: one of the run's checkpoints, its name or its step; None for the newest.
            wait: whether to wait until the checkpoint is served.
            on_note: callback that gets lines of text about the progress.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
            ServeError: the application is gone or failed.
            ClusterError: the cluster does not answer.
        """
        config, host, port = serving.deployed_config(self.connection, self.name)
        previous_path = location(config["args"]["checkpoint"])
        run = RunDir.of_checkpoint(previous_path)
        if adapters := adapter_paths(config):
            reason = f"its adapters ({', '.join(adapters)}) were trained on {previous_path.name}"
            raise ServeError(f"application {self.name}", reason, "remove these adapters first, or deploy it again")
        path, _ = pick_checkpoint(run, checkpoint, verify_hashes=False, on_note=on_note)
        is_deployed, remark = True, f"in place of {previous_path.name}"
        if path.name == previous_path.name:
            # Serve also keeps the configuration of an update that failed, so only the status tells what is served.
            status = _application_status(self.connection, self.name)
            is_deployed, remark = status not in ("DEPLOYING", "RUNNING"), "again"
            if status == "DEPLOYING":
                on_note(f"{path.name} is being deployed already")
        if is_deployed:
            config["args"] = {**config["args"], "checkpoint": str(path)}
            _deploy(self.connection, config, host, port, remark, on_note)
        if wait:
            self.wait(on_note=on_note)
        return ServiceUpdate(path.name, is_deployed)

    @property
    def adapters(self) -> dict[str, Location]:
        """Checkpoint of each adapter by its name, with which requests ask for it as their `model`.

        Raises:
            ServeError: the application is gone.
            ClusterError: the cluster does not answer.
        """
        return adapter_paths(serving.deployed_config(self.connection, self.name)[0])

    def change_adapters(
        self,
        add: Mapping[str, str | PathLike[str]] | None = None,
        remove: Collection[str] = (),
        *,
        wait: bool = True,
        on_note: OnNote = ignore_note,
    ) -> None:
        """Add, replace and remove adapters while the service answers. Requests finish with what they began with.

        Args:
            add: runs, RUN@STEP or folders of checkpoints by the names of the adapters.
            remove: names of adapters.
            wait: whether to wait until all replicas have the adapters.
            on_note: callback that gets lines of text about the progress.

        Raises:
            RunError, CheckpointError: an adapter's checkpoint is missing or damaged.
            ServeError: the application is gone, has no place for so many adapters or no adapter to remove, an adapter
                is of other weights, or a replica could not load it.
            ClusterError: the cluster does not answer.
        """
        config, host, port = serving.deployed_config(self.connection, self.name)
        subject, path = f"application {self.name}", location(config["args"]["checkpoint"])
        run, adapters = RunDir.of_checkpoint(path), adapter_paths(config)
        for name in remove:
            if name not in adapters:
                served_names = ", ".join(adapters) or "none"
                raise ServeError(f"adapter {name}", f"{subject} does not have it", f"it has {served_names}")
            del adapters[name]
        settings = ServeSpec.model_validate(config["args"]["serve"])
        adapters |= find_adapters(add or {}, path, run, settings)
        if len(adapters) > settings.max_adapters:
            reason = f"it has places for {settings.max_adapters} adapters, and this would make {len(adapters)}"
            raise ServeError(subject, reason, "remove some, or deploy it with a larger serve.max_adapters")
        set_adapters(config, adapters)
        _deploy(self.connection, config, host, port, f"with the adapters {', '.join(adapters) or 'none'}", on_note)
        if wait:
            self.wait(on_note=on_note)
            self._check_loaded(adapters)

    def _check_loaded(self, adapters: Collection[str]) -> None:
        """Raise ServeError if a replica lacks an adapter, which it could not load."""
        for replica in self.stats()["replicas"]:
            for name in sorted(set(adapters) - set(replica["adapters"])):
                reason = f"replica {replica['replica']} could not load it"
                raise ServeError(f"adapter {name}", reason, "see the replica's log in the dashboard")

    def stop(self, on_note: OnNote = ignore_note) -> None:
        """Stop serving, and wait until running requests are finished and the application is gone.

        Args:
            on_note: callback that now and then gets a line of text about the progress.

        Raises:
            ServeError: there is no such application any more.
            ClusterError: the cluster does not answer.
        """
        remove(self.connection, self.name, on_note)


def _checkpoint_of(application: Application) -> Location:
    """Return the path of the checkpoint that an application serves; a ServeError says that it serves none."""
    if application.checkpoint is None:
        reason = "it serves no checkpoint of a run"
        raise ServeError(f"application {application.name}", reason, "see `mhmoe serve status`")
    return location(application.checkpoint)


def _deploy(
    connection: Connection,
    config: dict[str, Any],
    host: str,
    port: int,
    remark: str,
    on_note: OnNote,
) -> None:
    """Deploy an application without waiting until it answers, and record it in the run directories. `remark` ends the
    note "deploying CHECKPOINT ...", such as "of RUN"."""
    name, path = config["name"], location(config["args"]["checkpoint"])
    adapter_uses = {f"{name}/{adapter}": path for adapter, path in adapter_paths(config).items()}
    # Serve ignores a configuration that it already has, so a random argument starts a failed application again.
    if _application_status(connection, name) in ("DEPLOY_FAILED", "UNHEALTHY"):
        config["args"]["again"] = token_hex(3)
    on_note(Activity(f"deploying {path.name}"))
    url = serving.deploy(connection, config, host, port)
    # The deployment is recorded, so that `mhmoe status` can ask the application and retention keeps its checkpoints,
    # before anything waits for it: Serve continues to deploy and may succeed even if this process ends early.
    for use, used_path in {name: path, **adapter_uses}.items():
        fields = {"application": use, "url": url, "address": connection.address, "checkpoint": used_path.name}
        events.record_use(RunDir.of_checkpoint(used_path), "served", on_note, **fields)
    on_note(f"deploying {path.name} {remark}")


def _application_status(connection: Connection, name: str) -> str | None:
    """Return Ray Serve's status of an application; None if the cluster has no application of this name."""
    return next((a.status for a in serving.applications(connection) if a.name == name), None)
