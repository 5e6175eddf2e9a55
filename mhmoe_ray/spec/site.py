"""What a cluster is made of: the file that `mhmoe cluster render` makes manifests of. A run's spec is not in it."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,200}$")]
"""What may stand in a manifest or a script as it is: no blanks, quotes or signs that a shell knows."""
Name = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
TokenPath = Annotated[str, Field(pattern=r"^~?(/[A-Za-z0-9._-]+)+$")]
Mount = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._-]+)+$")]


class NodeSpec(Section):
    """One machine, or what a pod asks of one."""

    cpus: PositiveInt
    memory_gib: PositiveInt
    gpus: NonNegativeInt = 0
    labels: dict[Word, Word] = Field(default_factory=dict)
    """Of Ray's node, for example a rack: what `cluster.domain_label` of a run's spec may name."""


class GroupSpec(NodeSpec):
    """Equal nodes, of which an autoscaler starts as many as are needed."""

    min: NonNegativeInt = 0
    max: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        return self


class StorageSpec(Section):
    """A file system that all nodes mount at the same place: run directories and prepared data lie on it."""

    mount: Mount = "/mnt/mhmoe"
    claim: Name = "mhmoe-storage"
    """On Kubernetes: a PersistentVolumeClaim, ReadWriteMany."""
    nfs: Word | None = None
    """Elsewhere: host:/export of an NFS server, which each node mounts when it starts; without one it is there."""


class CloudSpec(Section):
    region: Word
    zone: Word | None = None
    """By default the provider's choice; on GCP needed."""
    project: Word | None = None
    """Of GCP."""
    head: Word
    data: Word
    workers: Word
    """Types of machines."""
    image: Word | None = None
    """Of all of them: an AMI of the region, or an image or a family of them on GCP, of Ubuntu with Docker. Workers with
    GPUs need NVIDIA's driver, 580 or newer, and its container toolkit in it. On GCP there is a default; on AWS it is
    Ray's, whose driver is older."""
    spot: bool = False
    """Workers on spot machines: runs go on elsewhere when one is taken away."""


class OnPremiseSpec(Section):
    user: Word
    head: Word
    workers: Annotated[tuple[Word, ...], Field(min_length=1)]
    """Hosts that this machine reaches by ssh."""


class SlurmSpec(Section):
    partition: Word
    account: Word | None = None
    nodes: PositiveInt
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d\d:\d\d$")] = "24:00:00"
    port: int = Field(default=6379, ge=1024, le=65535)
    dashboard_port: int = Field(default=8265, ge=1024, le=65535)


class SiteSpec(Section):
    name: Name = "mhmoe"
    namespace: Name = "default"
    image: Word
    """Of all nodes; the container file makes one."""
    head: NodeSpec = NodeSpec(cpus=4, memory_gib=16)
    data: GroupSpec = GroupSpec(cpus=16, memory_gib=64, max=4)
    """Nodes without GPUs, for Ray Data: preparing, and streaming beside workers that take all CPUs of theirs."""
    workers: GroupSpec
    storage: StorageSpec = StorageSpec()
    token_file: TokenPath = "~/.ray/auth_token"
    """With the cluster's token, on the machine that starts it. On Kubernetes the operator makes one instead."""
    redis: Word | None = None
    """host:port, where the head keeps what it must know after a restart; without one, a new head knows nothing of
    running jobs. Run directories do in either case."""
    redis_secret: Name | None = None
    """On Kubernetes: a Secret with its password, under the key `password`."""
    monitor_labels: dict[Word, LabelValue] = Field(default_factory=dict)
    """On Kubernetes: of the PodMonitor, by which Prometheus' operator finds it; kube-prometheus-stack asks for
    `release`, the name of its own Helm release."""
    gateway: Word = "istio"
    """On Kubernetes: the class of Gateway that shifts requests from a served version to the next."""
    aws: CloudSpec | None = None
    gcp: CloudSpec | None = None
    on_premise: OnPremiseSpec | None = None
    slurm: SlurmSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.gpus or self.head.gpus:
            raise ValueError("head and data nodes are for CPUs: set gpus of workers alone")
        if self.head.labels:
            raise ValueError("nothing runs on the head, so its labels would be ignored: set those of data or workers")
        if self.redis_secret and not self.redis:
            raise ValueError("redis_secret is the password of redis, of which there is none")
        if self.gcp and not (self.gcp.zone and self.gcp.project):
            raise ValueError("gcp needs zone and project")
        if self.aws and self.workers.gpus and not self.aws.image:
            raise ValueError(
                "aws needs image where workers have GPUs: an AMI of its region with NVIDIA's driver 580 or newer, for "
                "Ray's default has an older one"
            )
        return self
