"""All files of a site, by path, and whether a run's workers fit on its nodes."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.placement import Node, packed
from mhmoe_ray.render import kuberay, ray_up, slurm
from mhmoe_ray.render.kuberay import containerfile
from mhmoe_ray.render.monitoring import DASHBOARDS, RAY_FOLDER, dashboard, pod_monitor, prometheus, provisioning
from mhmoe_ray.spec import RunSpec, dump_spec
from mhmoe_ray.spec.cluster import STREAM_CPUS
from mhmoe_ray.spec.site import SiteSpec


def nodes_for(site: SiteSpec, run: RunSpec) -> int:
    """Return the largest number of worker nodes that the run uses.

    Raises:
        SpecError: one of its workers is larger than a node, or the nodes are too few; or no node has CPUs left for the
            data stream.
    """
    each, cluster = site.workers, run.cluster
    wanted, cpus, gpus = cluster.workers.max, cluster.cpus_per_worker, cluster.gpus_per_worker
    nodes = [Node(f"worker {i}", each.cpus, each.gpus) for i in range(each.max)]
    places = packed(nodes, cpus, gpus, wanted)
    if len(places) < wanted:
        why = (
            f"{wanted} workers of {cpus} CPU and {gpus} GPU each do not fit on {each.max} nodes of {each.cpus} CPUs "
            f"and {each.gpus} GPUs, which hold {len(places)}"
        )
        raise SpecError(f"run {run.name}", why, "raise workers.max of the site, or lower cluster.workers of the run")
    used = len(set(places))
    spare = used * each.cpus - wanted * cpus + site.data.max * site.data.cpus
    if spare < STREAM_CPUS:
        why = f"its workers leave {spare} CPUs for the data stream, which needs {STREAM_CPUS}"
        raise SpecError(f"run {run.name}", why, "raise data.max of the site")
    return used


MARK = "# Rendered by `mhmoe cluster render`: change the site's file, not this one.\n"


def files(site: SiteSpec, run: RunSpec | None = None, application: dict[str, Any] | None = None) -> dict[str, str]:
    """Return the contents of all files of a site, by path.

    Args:
        site: the description of the cluster.
        run: a run to train on it; None for no run.
        application: an application to serve on it, as `serve.config.application_config` makes it; None for no
            application.

    Raises:
        SpecError: the run does not fit on the site, the run or the checkpoint is not on the site's storage, or a name
            is longer than KubeRay takes.
    """
    return dict(_files(site, run, application))


def _files(site: SiteSpec, run: RunSpec | None, application: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    yield "kuberay/raycluster.yaml", _yaml(kuberay.ray_cluster(site))
    if run:
        nodes_for(site, run)
        _check_storage(site, run)
        spec_path = f"jobs/{run.name}.yaml"
        yield spec_path, dump_spec(run)
        job = kuberay.ray_job(site, f"{site.storage.mount}/{spec_path}", run.name)
        yield f"kuberay/rayjob-{run.name}.yaml", _yaml(job)
    if application:
        checkpoint = application["args"]["checkpoint"]
        _check_place(site, checkpoint, f"checkpoint {checkpoint}", "copy its run there, and name it by its path")
        yield f"kuberay/rayservice-{application['name']}.yaml", _yaml(kuberay.ray_service(site, application))
    yield "kuberay/podmonitor.yaml", _yaml(pod_monitor(site))
    if site.aws:
        yield "ray-up/aws.yaml", _yaml(ray_up.aws(site, site.aws))
    if site.gcp:
        yield "ray-up/gcp.yaml", _yaml(ray_up.gcp(site, site.gcp))
    if site.on_premise:
        yield "ray-up/on-premise.yaml", _yaml(ray_up.on_premise(site, site.on_premise))
    if site.slurm:
        yield "slurm.sh", slurm.script(site, site.slurm)
    yield "Containerfile", containerfile()
    yield "prometheus/prometheus.yml", _yaml(prometheus(RAY_FOLDER))
    for of in DASHBOARDS:
        yield f"grafana/dashboards/{of.name}.json", json.dumps(dashboard(of), indent=1) + "\n"
    for path, content in provisioning().items():
        yield f"grafana/provisioning/{path}", _yaml(content)


def _check_storage(site: SiteSpec, run: RunSpec) -> None:
    """Check that a run's directory and data are on the site's storage, where all nodes read and write them.

    Raises:
        SpecError: one of them is not, or the spec does not declare a shared filesystem.
    """
    mount = site.storage.mount
    for key, place in (("storage", run.storage), ("data.prepared", run.data.prepared)):
        _check_place(site, str(place), f"run {run.name}, {key}", f"put it there: --set {key}={mount}/...")
    if not run.cluster.shared_filesystem:
        why = f"nodes are to share {mount}, and the spec does not say so, without which `mhmoe submit` refuses it there"
        raise SpecError(f"run {run.name}", why, "--set cluster.shared_filesystem=true")


def _check_place(site: SiteSpec, place: str, what: str, fix: str) -> None:
    if "://" not in place and not place.startswith(f"{site.storage.mount}/"):
        raise SpecError(what, f"{place} is not below {site.storage.mount}, which nodes of the site share", fix)


class _Plain(yaml.SafeDumper):
    """YAML dumper without anchors, which writes a value that occurs twice in full both times."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(content: dict[str, Any]) -> str:
    return MARK + yaml.dump(content, Dumper=_Plain, sort_keys=False, width=120)
