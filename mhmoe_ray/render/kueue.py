"""Manifests of Kueue's objects: the queue of a site, its quota, and priority classes."""

from typing import Any

from mhmoe_ray.render.kuberay import SUBMITTER, pod_resources
from mhmoe_ray.spec.site import KueueSpec, SiteSpec

API_VERSION = "kueue.x-k8s.io/v1beta2"


def queue_objects(site: SiteSpec, kueue: KueueSpec) -> dict[str, Any]:
    """Return the manifest of a List with the objects of a site's queue, whose quota is all nodes of the site.

    Kueue admits a cluster when the requests of all of its pods fit into the quota, and not earlier.
    """
    name = site.name
    quota = [{"name": resource, "nominalQuota": quantity} for resource, quantity in _site_quota(site).items()]
    group = {
        "coveredResources": [entry["name"] for entry in quota],
        "flavors": [{"name": name, "resources": quota}],
    }
    cluster_queue = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": site.namespace}},
        "resourceGroups": [group],
        **({"preemption": {"withinClusterQueue": "LowerPriority"}} if kueue.priorities else {}),
    }
    items = [
        _manifest("ResourceFlavor", name, spec={}),
        _manifest("ClusterQueue", name, spec=cluster_queue),
        _manifest("LocalQueue", kueue.queue, site.namespace, spec={"clusterQueue": name}),
        *(_manifest("WorkloadPriorityClass", name, value=value) for name, value in kueue.priorities.items()),
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def _site_quota(site: SiteSpec) -> dict[str, int | str]:
    """Return the total of what the pods of a site request, by resource. A pod that requests another one never runs."""
    groups = [(site.head, 1), (SUBMITTER, 1), (site.data, site.data.max), (site.workers, site.workers.max)]
    totals: dict[str, int] = {}
    for node, count in groups:
        for resource, quantity in (pod_resources(node) | {"memory": node.memory_gib}).items():
            totals[resource] = totals.get(resource, 0) + count * int(quantity)
    return totals | {"memory": f"{totals['memory']}Gi"}


def _manifest(kind: str, name: str, namespace: str | None = None, **fields: Any) -> dict[str, Any]:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, **fields}
