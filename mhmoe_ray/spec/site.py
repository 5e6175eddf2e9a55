"""The site file: a description of a cluster, from which `mhmoe cluster render` writes manifests."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,200}$")]
"""Text that needs no quotes in a manifest or a script."""
Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$")]
# The syntax of label values on Kubernetes, which has at most 63 characters.
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
Line = Annotated[str, Field(pattern=r"^\P{Cc}*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
DeviceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
TokenPath = Annotated[str, Field(pattern=r"^~?(/[A-Za-z0-9._-]+)+$")]
Mount = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._-]+)+$")]


_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
_RDMA_VARIABLE = re.compile(r"NCCL_IB_(?!DISABLE$)|NCCL_NET_GDR|FI_EFA_")


class Toleration(Section):
    """Toleration of a taint, with the keys of Kubernetes."""

    key: LabelKey | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None


class PodSpec(Section):
    """Settings of a group's pods on Kubernetes, which the manifests contain as they are."""

    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    """Tolerations in addition to that of `nvidia.com/gpu`, which pods with GPUs have."""
    annotations: dict[LabelKey, Line] = Field(default_factory=dict)
    """Annotations, such as the secondary networks of RDMA, or the topology that Kueue shall choose."""
    devices: dict[DeviceName, PositiveInt] = Field(default_factory=dict)
    """Number of devices that each pod requests, by the resource's name in your cluster, such as `rdma/ib`."""
    environment: dict[Variable, Line] = Field(default_factory=dict)
    """Environment variables, such as NCCL's. Secrets belong into `store_secret` and `tracker_secret`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "nvidia.com/gpu" in self.devices:
            raise ValueError("nvidia.com/gpu is not among devices: set gpus of the group")
        for name in self.environment:
            if _SECRET.search(name):
                raise ValueError(f"{name} would be readable in manifests: put it into store_secret or tracker_secret")
            if _RDMA_VARIABLE.match(name) and not self.devices:
                raise ValueError(f"{name} is for RDMA, but the pods get no RDMA device: set devices, or leave it out")
        return self


class NodeSpec(Section):
    """Resources of one node: of a machine, or those that a pod requests on Kubernetes."""

    cpus: PositiveInt
    memory_gib: PositiveInt
    gpus: NonNegativeInt = 0
    labels: dict[Word, Word] = Field(default_factory=dict)
    """Labels of the Ray node, such as its rack, for `cluster.domain_label` in the spec of a run."""
    pod: PodSpec = PodSpec()


class GroupSpec(NodeSpec):
    """Group of equal nodes, of which an autoscaler starts as many as are needed."""

    min: NonNegativeInt = 0
    max: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        return self


class StorageSpec(Section):
    """File system with run directories and prepared data, which all nodes mount at the same path."""

    mount: Mount = "/mnt/mhmoe"
    claim: Name | None = "mhmoe-storage"
    """Name of the PersistentVolumeClaim on Kubernetes, which must be ReadWriteMany. With null, pods have no shared
    storage, and all paths of runs lie in object stores."""
    nfs: Word | None = None
    """NFS export host:/export, which nodes of `aws`, `gcp` and `on_premise` mount when they start. By default the file
    system must already be mounted."""


class CloudSpec(Section):
    """Location and machine types of a cluster on AWS or GCP."""

    region: Word
    zone: Word | None = None
    """Availability zone; by default the provider chooses it, but GCP requires it."""
    project: Word | None = None
    """Project on GCP, which requires it."""
    head: Word
    data: Word
    workers: Word
    """Machine type of the worker nodes; `head` and `data` are those of the other nodes."""
    image: Word | None = None
    """Image with Ubuntu and Docker: an AMI of the region, or an image or image family on GCP. For GPUs it needs
    NVIDIA's driver 580 or newer and container toolkit, as GCP's default has; the default on AWS, Ray's, has an older
    driver."""
    spot: bool = False
    """If true, workers run on spot machines; a run continues on other nodes if one is taken away."""


class OnPremiseSpec(Section):
    """Existing machines by host name, and the user who logs in to them."""

    user: Word
    head: Word
    workers: Annotated[tuple[Word, ...], Field(min_length=1)]
    """Host names of the worker nodes, to which the machine that starts the cluster logs in by ssh."""


class SlurmSpec(Section):
    """Resources of the Slurm job in which the cluster runs."""

    partition: Word
    account: Word | None = None
    nodes: PositiveInt
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d\d:\d\d$")] = "24:00:00"
    port: int = Field(default=6379, ge=1024, le=65535)
    dashboard_port: int = Field(default=8265, ge=1024, le=65535)


GANG_LABEL = "ray.io/gang-scheduling-enabled"
"""Label by which KubeRay lets its batch scheduler, such as Volcano, start all pods of a cluster together or none."""


class KueueSpec(Section):
    """Queue of Kueue, in which a cluster waits until all of its pods fit into the quota."""

    queue: Name
    """Name of the LocalQueue."""
    priority: Name | None = None
    """Name of the WorkloadPriorityClass of clusters and jobs."""
    priorities: dict[Name, Annotated[int, Field(ge=-(2**31), lt=2**31)]] = Field(default_factory=dict)
    """Values of the WorkloadPriorityClasses that `kuberay/kueue.yaml` creates, by name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.priorities and self.priority and self.priority not in self.priorities:
            raise ValueError(f"priority {self.priority} is not among priorities ({', '.join(self.priorities)}): add it")
        return self


class SiteSpec(Section):
    """Description of a cluster: its nodes, its storage, and the platforms that it can run on."""

    name: Name = "mhmoe"
    namespace: Name = "default"
    image: Word
    """Container image of all nodes, best as `NAME@sha256:...`; the project's container file builds one."""
    head: NodeSpec = NodeSpec(cpus=4, memory_gib=16)
    data: GroupSpec = GroupSpec(cpus=16, memory_gib=64, max=4)
    """Nodes without GPUs for data preparation, and for a run's data stream if workers use all their CPUs."""
    workers: GroupSpec
    storage: StorageSpec = StorageSpec()
    token_file: TokenPath = "~/.ray/auth_token"
    """File with the cluster's token on the machine that starts the cluster; on Kubernetes the operator creates one."""
    redis: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,200}:[0-9]{1,5}$")] | None = None
    """Address host:port of a Redis server with the head node's state. Without it, a restarted head node does not know
    the running jobs, which run directories record in either case."""
    redis_secret: Name | None = None
    """Name of the Kubernetes Secret with the password of Redis under the key `password`."""
    store_secret: Name | None = None
    """Name of the Kubernetes Secret whose entries are variables of the pods, with the credentials of object stores."""
    tracker_secret: Name | None = None
    """Name of the Kubernetes Secret whose entries are variables of the pods, such as WANDB_API_KEY."""
    service_account: Name | None = None
    """Name of the pods' Kubernetes service account, which a cloud may let use object stores; then no key is needed."""
    kueue: KueueSpec | None = None
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels of the RayCluster, RayJob and RayService on Kubernetes, such as those of a batch scheduler."""
    monitor_labels: dict[Word, LabelValue] = Field(default_factory=dict)
    """Labels by which the Prometheus operator finds the PodMonitor on Kubernetes; kube-prometheus-stack looks for
    `release` with the name of its Helm release."""
    gateway: Word = "istio"
    """Class of the Kubernetes Gateway that shifts requests to the next served version of a model."""
    aws: CloudSpec | None = None
    gcp: CloudSpec | None = None
    on_premise: OnPremiseSpec | None = None
    slurm: SlurmSpec | None = None

    @property
    def has_fixed_size(self) -> bool:
        """Return whether clusters on Kubernetes have a fixed size, because all of their pods start together."""
        return self.kueue is not None or GANG_LABEL in self.labels

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.gpus or self.head.gpus:
            raise ValueError("head and data nodes are for CPUs: set gpus of workers alone")
        if any(key.startswith("kueue.x-k8s.io/") for key in self.labels):
            raise ValueError("labels of Kueue do not give clusters the fixed size that it needs: set kueue instead")
        if self.head.labels:
            raise ValueError("nothing runs on the head, so its labels would be ignored: set those of data or workers")
        if self.redis_secret and not self.redis:
            raise ValueError("redis_secret has the password of redis, but redis is not set: set redis too")
        if self.gcp and not (self.gcp.zone and self.gcp.project):
            raise ValueError("gcp needs zone and project")
        if self.aws and self.workers.gpus and not self.aws.image:
            raise ValueError(
                "aws needs image where workers have GPUs, because Ray's default has an older driver: set it to an AMI "
                "of its region with NVIDIA's driver 580 or newer"
            )
        return self
