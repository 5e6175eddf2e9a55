"""Cluster files for `ray up`: AWS, GCP, and machines of one's own."""

from typing import Any

from mhmoe_ray.spec.site import CloudSpec, GroupSpec, NodeSpec, OnPremiseSpec, SiteSpec

TOKEN = "/home/ray/.ray/auth_token"
"""Where each node has it, in its container."""
IDLE_MINUTES = 10
GCS_PORT = 6379
# Ray's own default for `ray start` is an open cluster. The dashboard is reached through `ray dashboard`, a tunnel.
_EXPORTS = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={TOKEN}; ulimit -n 65536"
_JOIN = f"{_EXPORTS}; ray start --address=$RAY_HEAD_IP:{GCS_PORT}"


def aws(site: SiteSpec, cloud: CloudSpec) -> dict[str, Any]:
    def machine(kind: str, spot: bool) -> dict[str, Any]:
        market = {"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 200, "VolumeType": "gp3"}}
        return {"InstanceType": kind, "BlockDeviceMappings": [disk], **market}

    provider = {"type": "aws", "region": cloud.region, "cache_stopped_nodes": False}
    if cloud.zone:
        provider["availability_zone"] = cloud.zone
    types = _types(site, machine(cloud.head, False), machine(cloud.data, False), machine(cloud.workers, cloud.spot))
    return _cloud(site, provider, "ubuntu", types)


def gcp(site: SiteSpec, cloud: CloudSpec) -> dict[str, Any]:
    def machine(kind: str, spot: bool) -> dict[str, Any]:
        image = "projects/deeplearning-platform-release/global/images/family/common-cpu"
        disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT"}
        disk |= {"initializeParams": {"diskSizeGb": 200, "sourceImage": image}}
        scheduling = {"scheduling": [{"preemptible": True}]} if spot else {}
        return {"machineType": kind, "disks": [disk], **scheduling}

    provider = {"type": "gcp", "region": cloud.region, "availability_zone": cloud.zone, "project_id": cloud.project}
    types = _types(site, machine(cloud.head, False), machine(cloud.data, False), machine(cloud.workers, cloud.spot))
    return _cloud(site, provider, "ubuntu", types)


def on_premise(site: SiteSpec, hosts: OnPremiseSpec) -> dict[str, Any]:
    """All of them are alike: data nodes are not told apart."""
    provider = {"type": "local", "head_ip": hosts.head, "worker_ips": list(hosts.workers)}
    return {
        **_common(site, provider, hosts.user),
        "max_workers": len(hosts.workers),
        "head_start_ray_commands": ["ray stop", _head("")],
        "worker_start_ray_commands": ["ray stop", f"{_JOIN} --block"],
    }


def _cloud(site: SiteSpec, provider: dict[str, Any], user: str, types: dict[str, Any]) -> dict[str, Any]:
    return {
        **_common(site, provider, user),
        "max_workers": site.data.max + site.workers.max,
        "idle_timeout_minutes": IDLE_MINUTES,
        "available_node_types": types,
        "head_node_type": "head",
        "head_start_ray_commands": ["ray stop", _head("--autoscaling-config=~/ray_bootstrap_config.yaml")],
        "worker_start_ray_commands": ["ray stop", _JOIN],
    }


def _common(site: SiteSpec, provider: dict[str, Any], user: str) -> dict[str, Any]:
    mount = site.storage.mount
    commands = []
    if site.storage.nfs:
        commands = [
            "sudo apt-get install -y nfs-common",
            f"sudo mkdir -p {mount}",
            f"mountpoint -q {mount} || sudo mount -t nfs4 {site.storage.nfs} {mount}",
        ]
    return {
        "cluster_name": site.name,
        "provider": provider,
        "auth": {"ssh_user": user},
        "docker": {
            "image": site.image,
            "container_name": "mhmoe",
            # Ray sizes the container's shared memory by itself.
            "run_options": [f"--volume={mount}:{mount}", "--ulimit nofile=65536:65536"],
        },
        "file_mounts": {TOKEN: site.token_file},
        "initialization_commands": commands,
    }


def _head(options: str) -> str:
    start = f"ray start --head --port={GCS_PORT} --dashboard-host=127.0.0.1 --num-cpus=0 --disable-usage-stats"
    return f"{_EXPORTS}; {start} {options}".rstrip()


def _types(site: SiteSpec, head: Any, data: Any, workers: Any) -> dict[str, Any]:
    return {
        "head": {"node_config": head, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0},
        "data": _type(site.data, data),
        "workers": _type(site.workers, workers),
    }


def _type(group: GroupSpec, machine: dict[str, Any]) -> dict[str, Any]:
    labels = {"labels": dict(group.labels)} if group.labels else {}
    return {
        "node_config": machine,
        "resources": _resources(group),
        "min_workers": group.min,
        "max_workers": group.max,
        **labels,
    }


def _resources(node: NodeSpec) -> dict[str, int]:
    return {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})
