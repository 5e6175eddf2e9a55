"""What `mhmoe plan` reckons with: accelerators and the links between them. Nothing is computed otherwise for it, but
a run's `mfu` is to the accelerator's peak: on others than the default, name theirs.

Defaults are data-sheet figures of NVIDIA's DGX H100 (H100 SXM: 80 GB, 3.35 TB/s; 989 TFLOP/s in bfloat16 without
sparsity, 67 in float32; NVLink of 900 GB/s, which is 450 each way; a 400 Gb/s InfiniBand port for each GPU), and
between domains one 100 Gb/s Ethernet port for each node. Latencies of the first two are those by which NCCL picks an
algorithm (`hwLat` of its src/graph/tuning.cc: ring, LL128, over NVLink and over the network); that of Ethernet is an
assumption, as are the shares of a peak that are reached.
"""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mhmoe_ray.spec.base import Section


class AcceleratorSpec(Section):
    name: str = "H100 SXM"
    bfloat16_flops: PositiveFloat = 989e12
    """Peak FLOP/s of dense matrix products in bfloat16."""
    float32_flops: PositiveFloat = 67e12
    """The same in float32, which torch does not turn to TF32 by itself."""
    flops_share: float = Field(default=0.4, gt=0, le=1)
    """Of that peak, what training reaches while it computes."""
    memory: PositiveFloat = 80e9
    """Bytes."""
    memory_bandwidth: PositiveFloat = 3.35e12
    """Peak bytes/s."""
    memory_share: float = Field(default=0.8, gt=0, le=1)
    """Of that peak, what is reached."""

    def peak(self, precision: Literal["float32", "bfloat16"]) -> float:
        """FLOP/s of matrix products."""
        return self.bfloat16_flops if precision == "bfloat16" else self.float32_flops


class LinkSpec(Section):
    """By default InfiniBand."""

    bandwidth: PositiveFloat = 50e9
    """Peak bytes/s, each way at once."""
    per: Literal["rank", "node"] = "rank"
    """Whether each rank has such a link, or all ranks of a node share one."""
    latency: float = Field(default=4e-6, ge=0)
    """Seconds that a message takes beside its bytes."""


class NodeLinkSpec(LinkSpec):
    """By default NVLink."""

    bandwidth: PositiveFloat = 450e9
    latency: float = Field(default=1.9e-6, ge=0)


class BetweenLinkSpec(LinkSpec):
    """By default Ethernet."""

    bandwidth: PositiveFloat = 12.5e9
    per: Literal["rank", "node"] = "node"
    latency: float = Field(default=20e-6, ge=0)


class NetworkSpec(Section):
    node: NodeLinkSpec = NodeLinkSpec()
    """Links within a node."""
    domain: LinkSpec = LinkSpec()
    """Links between nodes of a domain: a rack, a pod."""
    between: BetweenLinkSpec = BetweenLinkSpec()
    """Links between domains."""
    share: float = Field(default=0.8, gt=0, le=1)
    """Of peak bandwidths, what is reached."""
    nodes_per_domain: PositiveInt | None = None
    """Of a cluster on paper; by default all are in one. Of a real one, `domain_label` tells."""
