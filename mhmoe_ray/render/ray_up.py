"""Cluster files for `ray up`: AWS, GCP, and on-premise machines."""

from typing import Any

from mhmoe_ray.render.monitoring import RAY_FOLDER
from mhmoe_ray.spec.site import CloudSpec, GroupSpec, OnPremiseSpec, SiteSpec

TOKEN_PATH = "/home/ray/.ray/auth_token"
"""Path of the cluster's authentication token in the container of each node."""
IDLE_MINUTES = 10
GCS_PORT = 6379
# Without RAY_AUTH_MODE, `ray start` would start a cluster that is open to everybody if it finds no token. The limit of
# open files is the one in Ray's own cluster files.
_SETUP = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={TOKEN_PATH}; ulimit -n 65536"
# The head needs the autoscaling configuration to start workers. The dashboard listens on loopback only, because `ray
# dashboard` reaches it through a tunnel.
_START_HEAD = (
    f"{_SETUP}; ray start --head --port={GCS_PORT} --dashboard-host=127.0.0.1 --num-cpus=0 --disable-usage-stats "
    "--autoscaling-config=~/ray_bootstrap_config.yaml"
)
_START_WORKER = f"{_SETUP}; ray start --address=$RAY_HEAD_IP:{GCS_PORT}"
GCP_IMAGES = "projects/deeplearning-platform-release/global/images/family"
GCP_CPU_FAMILY, GCP_GPU_FAMILY = "common-cpu", "common-cu129-ubuntu-2404-nvidia-580"
"""Image families of GCP. The second has NVIDIA's driver, in a version that the CUDA of PyPI's torch accepts."""


def aws_config(site: SiteSpec, cloud: CloudSpec) -> dict[str, Any]:
    """Return the content of the cluster file with which `ray up` starts a cluster on AWS."""

    def node_config(kind: str, spot: bool) -> dict[str, Any]:
        market = {"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 200, "VolumeType": "gp3"}}
        image = {"ImageId": cloud.image} if cloud.image else {}
        return {"InstanceType": kind, **image, "BlockDeviceMappings": [disk], **market}

    # Without this setting, Ray does not terminate idle machines but only stops them and keeps them for reuse.
    provider = {"type": "aws", "region": cloud.region, "cache_stopped_nodes": False}
    if cloud.zone:
        provider["availability_zone"] = cloud.zone
    types = _node_types(
        site, node_config(cloud.head, False), node_config(cloud.data, False), node_config(cloud.workers, cloud.spot)
    )
    return _cloud_config(site, provider, "ubuntu", types)


def gcp_config(site: SiteSpec, cloud: CloudSpec) -> dict[str, Any]:
    """Return the content of the cluster file with which `ray up` starts a cluster on GCP."""

    def node_config(kind: str, spot: bool, gpus: int = 0) -> dict[str, Any]:
        image = cloud.image or f"{GCP_IMAGES}/{GCP_GPU_FAMILY if gpus else GCP_CPU_FAMILY}"
        disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT"}
        disk |= {"initializeParams": {"diskSizeGb": 200, "sourceImage": image}}
        scheduling: list[dict[str, Any]] = [{"preemptible": True}] if spot else []
        if gpus:
            # GCP cannot move a running machine with GPUs to another host, so it must terminate the machine for
            # maintenance.
            scheduling.append({"onHostMaintenance": "TERMINATE"})
        return {"machineType": kind, "disks": [disk], **({"scheduling": scheduling} if scheduling else {})}

    provider = {"type": "gcp", "region": cloud.region, "availability_zone": cloud.zone, "project_id": cloud.project}
    workers = node_config(cloud.workers, cloud.spot, site.workers.gpus)
    types = _node_types(site, node_config(cloud.head, False), node_config(cloud.data, False), workers)
    return _cloud_config(site, provider, "ubuntu", types)


def on_premise_config(site: SiteSpec, hosts: OnPremiseSpec) -> dict[str, Any]:
    """Return the cluster file for on-premise machines, with one kind of worker node and no separate data nodes."""
    provider = {"type": "local", "head_ip": hosts.head, "worker_ips": list(hosts.workers)}
    return {**_common_config(site, provider, hosts.user), "max_workers": len(hosts.workers)}


def _cloud_config(site: SiteSpec, provider: dict[str, Any], user: str, types: dict[str, Any]) -> dict[str, Any]:
    return {
        **_common_config(site, provider, user),
        "max_workers": site.data.max + site.workers.max,
        "idle_timeout_minutes": IDLE_MINUTES,
        "available_node_types": types,
        "head_node_type": "head",
    }


def _common_config(site: SiteSpec, provider: dict[str, Any], user: str) -> dict[str, Any]:
    """Return the part of a cluster file that all providers share: the container, the storage and the start of Ray."""
    mount = site.storage.mount
    # The folder is created before Docker needs it: Docker would create it as root, and Ray runs as another user in the
    # container, which could not write to it.
    commands = [f"mkdir -p -m 1777 {RAY_FOLDER}"]
    if site.storage.nfs:
        commands += [
            # A machine that has just started updates itself and locks apt meanwhile, so apt-get waits for the lock.
            "sudo apt-get -o DPkg::Lock::Timeout=300 install -y nfs-common",
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
            # No option sets the size of shared memory, because Ray's launcher does. Ray's folder is mounted, so that a
            # Prometheus outside of the container can read the addresses of the nodes there.
            "run_options": [
                f"--volume={mount}:{mount}",
                f"--volume={RAY_FOLDER}:{RAY_FOLDER}",
                "--ulimit nofile=65536:65536",
            ],
        },
        "file_mounts": {TOKEN_PATH: site.token_file},
        "initialization_commands": commands,
        "head_start_ray_commands": ["ray stop", _START_HEAD],
        "worker_start_ray_commands": ["ray stop", _START_WORKER],
    }


def _node_types(site: SiteSpec, head: Any, data: Any, workers: Any) -> dict[str, Any]:
    return {
        "head": {"node_config": head, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0},
        "data": _node_type(site.data, data),
        "workers": _node_type(site.workers, workers),
    }


def _node_type(group: GroupSpec, node_config: dict[str, Any]) -> dict[str, Any]:
    """Return the node type of equal nodes: the provider's settings, the resources, and the limits for autoscaling."""
    labels = {"labels": dict(group.labels)} if group.labels else {}
    return {
        "node_config": node_config,
        "resources": {"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {}),
        "min_workers": group.min,
        "max_workers": group.max,
        **labels,
    }
