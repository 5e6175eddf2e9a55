"""Where Prometheus finds the nodes of a Ray cluster."""

from typing import Any

from mhmoe_ray.spec.site import SiteSpec

DISCOVERY = "prom_metrics_service_discovery.json"
"""The file in which Ray's head keeps the addresses of all nodes, in its folder for temporary files."""
RAY_FOLDER = "/tmp/ray"
"""That folder by Ray's default."""


def prometheus(ray_folder: str) -> dict[str, Any]:
    """Of a Prometheus on the head's machine.

    Args:
        ray_folder: what the head was started with as --temp-dir.
    """
    return {
        "global": {"scrape_interval": "10s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [f"{ray_folder}/{DISCOVERY}"]}]}],
    }


def pod_monitor(site: SiteSpec) -> dict[str, Any]:
    """For Prometheus' operator on Kubernetes: all pods of the cluster."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {
            "name": f"{site.name}-ray",
            "namespace": site.namespace,
            "labels": dict(site.monitor_labels),
        },
        "spec": {
            "selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
            "podMetricsEndpoints": [{"port": "metrics", "interval": "10s"}],
        },
    }
