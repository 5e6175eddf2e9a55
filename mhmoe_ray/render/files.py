"""All files of a site, by path, and the check that a run's workers fit on its nodes."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.placement import Node, pack_workers
from mhmoe_ray.render import kuberay, kueue, ray_up, slurm
from mhmoe_ray.render.container import containerfile
from mhmoe_ray.render.monitoring import (
    DASHBOARDS,
    RAY_FOLDER,
    dashboard_json,
    pod_monitor,
    prometheus_config,
    provisioning_files,
)
from mhmoe_ray.spec import RunSpec, dump_spec
from mhmoe_ray.spec.cluster import STREAM_CPUS
from mhmoe_ray.spec.site import SiteSpec
from mhmoe_ray.storage import STORES


def count_worker_nodes(site: SiteSpec, run: RunSpec) -> int:
    """Return the number of a site's worker nodes that a run uses with its largest number of workers.

    Workers that do not fit on the nodes, or that leave too few CPUs for the data stream, are a SpecError.
    """
    group, cluster = site.workers, run.cluster
    worker_count, cpus, gpus = cluster.workers.max, cluster.cpus_per_worker, cluster.gpus_per_worker
    nodes = [Node(f"worker {i}", group.cpus, group.gpus) for i in range(group.max)]
    # `pack_workers` places the workers in the same way as Ray will place them when the run starts.
    worker_nodes = pack_workers(nodes, cpus, gpus, worker_count)
    if len(worker_nodes) < worker_count:
        reason = (
            f"{worker_count} workers of {cpus} CPU and {gpus} GPU each do not fit on {group.max} nodes of "
            f"{group.cpus} CPUs and {group.gpus} GPUs, which hold {len(worker_nodes)}"
        )
        raise SpecError(f"run {run.name}", reason, "raise workers.max of the site, or lower cluster.workers of the run")
    node_count = len(set(worker_nodes))
    spare_cpus = node_count * group.cpus - worker_count * cpus + site.data.max * site.data.cpus
    if spare_cpus < STREAM_CPUS:
        reason = f"its workers leave {spare_cpus} CPUs for the data stream, which needs {STREAM_CPUS}"
        raise SpecError(f"run {run.name}", reason, "raise data.max of the site")
    return node_count


HEADER = "# Rendered by `mhmoe cluster render`: change the site's file, not this one.\n"
"""First line of each rendered YAML file, except of the spec of a run."""


_SECRET_OPTIONS = {
    "s3": "--from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=...",
    "gs": f"--from-literal=GOOGLE_APPLICATION_CREDENTIALS={kuberay.STORE_SECRET_FOLDER}/key.json --from-file=key.json",
    "wandb": "--from-literal=WANDB_API_KEY=...",
    "mlflow": "--from-literal=MLFLOW_TRACKING_TOKEN=...",
}
"""Options of `kubectl create secret` for the credentials of a store, by URI scheme, or tracker. Google's are a file."""


def _store_schemes(content: Any) -> list[str]:
    text = json.dumps(content)
    return [scheme for scheme in STORES if f"{scheme}://" in text]


def _trackers(run: RunSpec | None) -> list[str]:
    """Return the names of the tracking servers to which a run sends metrics."""
    if run is None:
        return []
    is_used = {"wandb": run.tracking.wandb == "online", "mlflow": run.tracking.mlflow}
    return [name for name, value in is_used.items() if value]


def _site_for(site: SiteSpec, run: RunSpec | None = None, application: dict[str, Any] | None = None) -> SiteSpec:
    """Return a site whose pods have only the storage and the credentials that a run or an application uses."""
    content = run.model_dump(mode="json") if run else application
    update: dict[str, Any] = {}
    if f"{site.storage.mount}/" not in json.dumps(content):
        update["storage"] = site.storage.model_copy(update={"claim": None})
    if not _store_schemes(content):
        update |= {"store_secret": None, "service_account": None}
    if not _trackers(run):
        update["tracker_secret"] = None
    if run and site.has_fixed_size:
        update["workers"] = site.workers.model_copy(update={"max": count_worker_nodes(site, run)})
    return site.model_copy(update=update)


def secret_advice(site: SiteSpec, run: RunSpec | None, application: dict[str, Any] | None) -> Iterator[str]:
    """Yield how pods get the credentials of the object stores and trackers that a run or an application uses."""

    def secret_note(secret: str, names: list[str], title: str) -> str:
        options = " ".join(_SECRET_OPTIONS[name] for name in names)
        command = f"kubectl create secret generic {secret} --namespace {site.namespace} {options}"
        return f"pods take the credentials for {title} from a secret; to create it: {command}"

    schemes, trackers = _store_schemes([run and run.model_dump(mode="json"), application]), _trackers(run)
    stores = " and ".join(f"{scheme}://" for scheme in schemes)
    if schemes and site.store_secret:
        yield secret_note(site.store_secret, schemes, stores)
    elif schemes and site.service_account:
        yield f"pods use {stores} as service account {site.service_account}; let your cloud permit it to that account"
    elif schemes:
        yield f"warning: pods get no credentials for {stores}; set store_secret or service_account in the site's file"
    if trackers and site.tracker_secret:
        yield secret_note(site.tracker_secret, trackers, " and ".join(trackers))
    elif "wandb" in trackers:
        yield "warning: pods get no WANDB_API_KEY; set tracker_secret in the site's file"


def render_files(
    site: SiteSpec, run: RunSpec | None = None, application: dict[str, Any] | None = None
) -> dict[str, str]:
    """Return the contents of all files of a site, by path, with a run to train and an application to serve on it.

    The application is one of `serving.config.application_config`. A run that does not fit, a run or checkpoint that is
    not on the site's storage, and a name that is too long for KubeRay are SpecErrors.
    """
    return dict(_iter_files(site, run, application))


def _iter_files(site: SiteSpec, run: RunSpec | None, application: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    yield "kuberay/raycluster.yaml", _yaml_text(kuberay.ray_cluster(site))
    if run:
        count_worker_nodes(site, run)
        _check_storage(site, run)
        yield f"kuberay/rayjob-{run.name}.yaml", _yaml_text(kuberay.ray_job(_site_for(site, run), run.name))
        yield f"kuberay/spec-{run.name}.yaml", _yaml_text(kuberay.run_spec_map(site, run.name, dump_spec(run)))
    if application:
        checkpoint = application["args"]["checkpoint"]
        _check_path(site, checkpoint, f"checkpoint {checkpoint}", "copy its run there, and name it by its path")
        service = kuberay.ray_service(_site_for(site, application=application), application)
        yield f"kuberay/rayservice-{application['name']}.yaml", _yaml_text(service)
    if site.kueue:
        yield "kuberay/kueue.yaml", _yaml_text(kueue.queue_objects(site, site.kueue))
    yield "kuberay/networkpolicy.yaml", _yaml_text(kuberay.network_policy(site))
    yield "kuberay/podmonitor.yaml", _yaml_text(pod_monitor(site))
    if site.aws:
        yield "ray-up/aws.yaml", _yaml_text(ray_up.aws_config(site, site.aws))
    if site.gcp:
        yield "ray-up/gcp.yaml", _yaml_text(ray_up.gcp_config(site, site.gcp))
    if site.on_premise:
        yield "ray-up/on-premise.yaml", _yaml_text(ray_up.on_premise_config(site, site.on_premise))
    if site.slurm:
        yield "slurm.sh", slurm.batch_script(site, site.slurm)
    yield "Containerfile", containerfile()
    yield "prometheus/prometheus.yml", _yaml_text(prometheus_config(RAY_FOLDER))
    for board in DASHBOARDS:
        yield f"grafana/dashboards/{board.name}.json", json.dumps(dashboard_json(board), indent=1) + "\n"
    for path, content in provisioning_files().items():
        yield f"grafana/provisioning/{path}", _yaml_text(content)


def _check_storage(site: SiteSpec, run: RunSpec) -> None:
    """Raise a SpecError unless all nodes of a site can reach a run's directory and its raw or prepared data."""
    mount = site.storage.mount
    paths = {"storage": str(run.storage), "data.prepared": str(run.data.prepared)}
    # Prepared data is not prepared again, so its sources are not read.
    if read_data_manifest(run.data.prepared) is None:
        paths |= {f"data.sources.{name}.path": source.path for name, source in run.data.sources.items()}
    for key, path in paths.items():
        _check_path(site, path, f"run {run.name}, {key}", f"put it there: --set {key}={mount}/...")
    if not run.cluster.shared_filesystem and not all("://" in path for path in paths.values()):
        reason = f"the nodes share {mount}, but the spec does not say so, and `mhmoe submit` would refuse it there"
        raise SpecError(f"run {run.name}", reason, "--set cluster.shared_filesystem=true")


def _check_path(site: SiteSpec, path: str, subject: str, fix: str) -> None:
    """Raise a SpecError if a path is neither on the site's storage nor in an object store."""
    # A URL of an object store is accepted, because all nodes can reach it without mounting the site's storage.
    if "://" in path:
        return
    if site.storage.claim is None:
        fix = "name a location on s3:// or gs://, or set storage.claim"
        raise SpecError(subject, f"{path} is a file path, but storage.claim of the site is null", fix)
    if not path.startswith(f"{site.storage.mount}/"):
        raise SpecError(subject, f"{path} is not below {site.storage.mount}, which nodes of the site share", fix)


class _PlainDumper(yaml.SafeDumper):
    """YAML dumper without anchors: a value that occurs twice is written in full both times."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml_text(content: dict[str, Any]) -> str:
    return HEADER + yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, width=120)
