"""Manifests for KubeRay's operator.

The manifests are a RayCluster, a RayJob that trains a run, and a RayService that serves a model.
"""

import re
from importlib.metadata import version
from typing import Any

import yaml

from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec.site import GroupSpec, NodeSpec, SiteSpec

UID = 1000
"""Id of the user that all nodes run as, and of its group."""
API_VERSION = "ray.io/v1"
MAX_NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""Largest number of characters of an object's name, by kind; the operator appends other characters to the name."""
IDLE_SECONDS = 300
STEP_PERCENT, STEP_SECONDS, SURGE_PERCENT = 25, 30, 100
"""Settings of the upgrade of a RayService to a new cluster: per cent of requests that move in one step, seconds between
steps, and per cent of its full capacity by which the new cluster grows at a time."""
PORTS = {"metrics": 8080, "serve": 8000}
"""Ports that every node's pod has, by name."""
SPEC_FOLDER, STORE_SECRET_FOLDER = "/etc/mhmoe", "/var/run/secrets/mhmoe"
"""Folders of a pod with the spec of the RayJob's run, and with the entries of the site's `store_secret` as files."""
SUBMITTER = NodeSpec(cpus=1, memory_gib=1)
"""Resources of the pod by which KubeRay submits the job of a RayJob."""
# Kubernetes cannot tell from the name of the image's user that it is not root, only from a number.
_USER = {
    **{"runAsNonRoot": True, "runAsUser": UID, "runAsGroup": UID},
    "seccompProfile": {"type": "RuntimeDefault"},
}
_UNPRIVILEGED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
HEAD_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, **PORTS}

# Clients, gateways and KubeRay's submitters of jobs are pods of the namespace. HTTPS leads to object stores and to the
# API of Kubernetes, which has port 6443 behind its service.
NETWORK_POLICY = """\
podSelector: &ray {matchLabels: {ray.io/is-ray-node: "yes"}}
policyTypes: [Ingress, Egress]
ingress:
- from: [{podSelector: *ray}]
- from:
  - podSelector: {}
  - {namespaceSelector: {}, podSelector: {matchLabels: {app.kubernetes.io/component: kuberay-operator}}}
  ports: [{port: 8265}, {port: 8000}]
- from: [{namespaceSelector: {}, podSelector: {matchLabels: {app.kubernetes.io/name: prometheus}}}]
  ports: [{port: 8080}]
egress:
- to: [{podSelector: *ray}]
- ports: [{port: 53, protocol: UDP}, {port: 53}]
- ports: [{port: 443}, {port: 6443}]
"""


def ray_cluster(site: SiteSpec) -> dict[str, Any]:
    """Return the manifest of a RayCluster: a cluster that stays until it is deleted."""
    return _manifest("RayCluster", site, site.name, _cluster_spec(site))


def run_spec_map(site: SiteSpec, name: str, text: str) -> dict[str, Any]:
    """Return the manifest of the ConfigMap with the spec of a run, from which the run's RayJob takes it."""
    metadata = {"name": f"{site.name}-{name}", "namespace": site.namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {f"{name}.yaml": text}}


def ray_job(site: SiteSpec, name: str) -> dict[str, Any]:
    """Return the manifest of a RayJob: a cluster that trains the run of a `run_spec_map`, and is then removed."""
    spec_path = f"{SPEC_FOLDER}/{name}.yaml"
    cluster_spec = _cluster_spec(site)
    head_pod = cluster_spec["headGroupSpec"]["template"]["spec"]
    _mount(head_pod, "spec", SPEC_FOLDER, {"configMap": {"name": f"{site.name}-{name}"}})
    submitter = {
        "name": "ray-job-submitter",
        "image": site.image,
        "resources": _equal_limits(SUBMITTER),
        "securityContext": _UNPRIVILEGED,
    }
    pod = {"restartPolicy": "Never", "securityContext": _USER, "containers": [submitter], **_placement(site.head)}
    return _manifest(
        "RayJob",
        site,
        f"{site.name}-{name}",
        {
            # With `--continue`, a job that Kubernetes starts again, perhaps on a new cluster, resumes the run in its
            # run directory.
            "entrypoint": f"mhmoe submit {spec_path} --continue --address http://127.0.0.1:{HEAD_PORTS['dashboard']}",
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": {"spec": pod},
            "backoffLimit": 3,
            # Kueue requires it. Kueue also sets `suspend`, which must not be in the file: when the file is applied
            # again, a running job would be suspended.
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "metadata": {"mhmoe_spec": spec_path},
            "rayClusterSpec": cluster_spec,
        },
    )


def ray_service(site: SiteSpec, application: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a RayService: an application of Ray Serve on a cluster of its own.

    A changed application, for example one with a newer checkpoint, takes over while both versions answer.
    """
    upgrade: dict[str, Any] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": site.gateway,
            "stepSizePercent": STEP_PERCENT,
            "intervalSeconds": STEP_SECONDS,
            "maxSurgePercent": SURGE_PERCENT,
        },
    }
    if site.has_fixed_size:  # KubeRay upgrades by steps only with the autoscaler.
        upgrade = {"type": "NewCluster"}
    return _manifest(
        "RayService",
        site,
        f"{site.name}-{application['name']}",
        {
            "serveConfigV2": yaml.safe_dump({"applications": [application]}, sort_keys=False),
            "upgradeStrategy": upgrade,
            "rayClusterConfig": _cluster_spec(site),
        },
    )


def network_policy(site: SiteSpec) -> dict[str, Any]:
    """Return the manifest of a NetworkPolicy: who may connect to the namespace's pods of Ray, and they to whom."""
    spec = yaml.safe_load(NETWORK_POLICY)
    if site.redis:
        spec["egress"][-1]["ports"].append({"port": int(site.redis.rpartition(":")[2])})
    metadata = {"name": f"{site.name}-ray", "namespace": site.namespace}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def _manifest(kind: str, site: SiteSpec, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of an object; a name that KubeRay or Kubernetes does not accept is a SpecError."""
    if len(name) > MAX_NAME_LENGTHS[kind]:
        reason = f"its name has {len(name)} characters, and KubeRay takes {MAX_NAME_LENGTHS[kind]}"
        raise SpecError(f"{kind} {name}", reason, "give the site, or the run, a shorter name")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        reason = "KubeRay takes names of small letters, digits and dashes that begin with a letter and end with no dash"
        raise SpecError(f"{kind} {name}", reason, "give the site, or the run, another name")
    labels = {"app.kubernetes.io/part-of": "mhmoe-ray", **site.labels}
    if site.kueue:
        labels["kueue.x-k8s.io/queue-name"] = site.kueue.queue
        if site.kueue.priority:
            labels["kueue.x-k8s.io/priority-class"] = site.kueue.priority
    metadata = {"name": name, "namespace": site.namespace, "labels": labels}
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": spec}


def _cluster_spec(site: SiteSpec) -> dict[str, Any]:
    """Return the `spec` of a RayCluster, which a RayJob and a RayService contain too."""
    spec: dict[str, Any] = {
        "rayVersion": version("ray"),
        # In this mode, the operator creates a token and gives it to all pods. Without a token, the dashboard would
        # accept jobs from everybody.
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # The head offers no CPUs, so that Ray places no worker there, which could use up the head's memory.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": _pod_template(site, "ray-head", site.head, HEAD_PORTS),
        },
        "workerGroupSpecs": [_group_spec(site, "data", site.data), _group_spec(site, "workers", site.workers)],
    }
    if not site.has_fixed_size:
        autoscaler = {"version": "v2", "idleTimeoutSeconds": IDLE_SECONDS, "securityContext": _UNPRIVILEGED}
        spec |= {"enableInTreeAutoscaling": True, "autoscalerOptions": autoscaler}
    if site.redis:
        options: dict[str, Any] = {"redisAddress": site.redis}
        if site.redis_secret:
            reference = {"secretKeyRef": {"name": site.redis_secret, "key": "password"}}
            options["redisPassword"] = {"valueFrom": reference}
        spec["gcsFaultToleranceOptions"] = options
    return spec


def _group_spec(site: SiteSpec, name: str, group: GroupSpec) -> dict[str, Any]:
    """Return the specification of a group of equal worker pods, which the autoscaler grows and shrinks."""
    min_replicas = group.max if site.has_fixed_size else group.min
    return {
        "groupName": name,
        "replicas": min_replicas,
        "minReplicas": min_replicas,
        "maxReplicas": group.max,
        "rayStartParams": {"num-cpus": str(group.cpus)},
        **({"labels": dict(group.labels)} if group.labels else {}),
        "template": _pod_template(site, "ray-worker", group, PORTS),
    }


def _pod_template(site: SiteSpec, name: str, node: NodeSpec, ports: dict[str, int]) -> dict[str, Any]:
    """Return the template of a pod with one container, which gets a node's resources and mounts the site's storage."""
    container: dict[str, Any] = {
        "name": name,
        "image": site.image,
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "resources": _equal_limits(node),
        "securityContext": _UNPRIVILEGED,
    }
    if secrets := [secret for secret in (site.store_secret, site.tracker_secret) if secret]:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in secrets]
    if node.pod.environment:
        container["env"] = [{"name": key, "value": value} for key, value in node.pod.environment.items()]
    pod: dict[str, Any] = {
        **({"serviceAccountName": site.service_account} if site.service_account else {}),
        # A new volume belongs to root, so its files are given to the group of Ray's user. OnRootMismatch does this
        # once, and not at each start of a pod.
        "securityContext": {"fsGroup": UID, "fsGroupChangePolicy": "OnRootMismatch", **_USER},
        "containers": [container],
        **_placement(node),
    }
    if site.storage.claim:
        _mount(pod, "storage", site.storage.mount, {"persistentVolumeClaim": {"claimName": site.storage.claim}})
    if site.store_secret:
        _mount(pod, "store-secret", STORE_SECRET_FOLDER, {"secret": {"secretName": site.store_secret}})
    # Ray and NCCL use shared memory, but a container has only 64 MB of it by default. A third of the node's memory is
    # enough, because Ray's object store takes 30 %.
    shm = {"medium": "Memory", "sizeLimit": f"{max(1, node.memory_gib // 3)}Gi"}
    _mount(pod, "shm", "/dev/shm", {"emptyDir": shm})
    return {**({"metadata": {"annotations": node.pod.annotations}} if node.pod.annotations else {}), "spec": pod}


def pod_resources(node: NodeSpec) -> dict[str, int | str]:
    """Return the resources that the pod of a node requests, by their names on Kubernetes."""
    gpus = {"nvidia.com/gpu": node.gpus} if node.gpus else {}
    return {"cpu": node.cpus, "memory": f"{node.memory_gib}Gi", **gpus, **node.pod.devices}


def _equal_limits(node: NodeSpec) -> dict[str, Any]:
    resources = {name: str(quantity) for name, quantity in pod_resources(node).items()}
    return {"limits": resources, "requests": resources}


def _placement(node: NodeSpec) -> dict[str, Any]:
    """Return the fields of a pod that say on which machines it may run."""
    tolerations = [_GPU_TOLERATION] if node.gpus else []
    tolerations += [toleration.model_dump(exclude_none=True) for toleration in node.pod.tolerations]
    fields = {"nodeSelector": node.pod.node_selector, "tolerations": tolerations}
    return {name: value for name, value in fields.items() if value}


def _mount(pod: dict[str, Any], name: str, path: str, source: dict[str, Any]) -> None:
    """Add a volume to a pod, and mount it at `path` in the pod's container."""
    pod.setdefault("volumes", []).append({"name": name, **source})
    pod["containers"][0].setdefault("volumeMounts", []).append({"name": name, "mountPath": path})


_GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
