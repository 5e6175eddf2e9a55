"""The llama architecture, as in the models of arXiv 2411.16205: RMSNorm, rotary positions, SwiGLU, no biases."""

from collections.abc import Mapping
from typing import ClassVar

from mhmoe_kernels.abilities import ExpertFunction, KernelName
from mhmoe_ray.architectures.base import FLOAT32, Architecture


class Llama(Architecture):
    """The llama architecture."""

    expert_function: ClassVar[ExpertFunction] = "swiglu"
    grouped_queries = True
    has_trunk_options = True
    runs_in_vllm = True
    norms_per_block = 2
    norm_vectors = 1
    expert_matrices = 3  # gate, up, down
    dense_launches = 82
    mixture_launches: ClassVar[Mapping[KernelName, int]] = {"grouped_gemm": 99, "grouped_mm": 109, "triton": 95}

    # fmt: off
    tensor_names = (
        ("blocks.{i}.ffn.gate_FD",           "model.layers.{i}.mlp.gate_proj.weight"),
        ("blocks.{i}.ffn.up_FD",             "model.layers.{i}.mlp.up_proj.weight"),
        ("blocks.{i}.ffn.down_DF",           "model.layers.{i}.mlp.down_proj.weight"),
        ("blocks.{i}.moe.experts.gate_EFD",  "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight"),
        ("blocks.{i}.moe.experts.up_EFD",    "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight"),
        ("blocks.{i}.moe.experts.down_EDF",  "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight"),
        ("blocks.{i}.moe.shared.gate_FD",    "model.layers.{i}.block_sparse_moe.shared_expert.gate_proj.weight"),
        ("blocks.{i}.moe.shared.up_FD",      "model.layers.{i}.block_sparse_moe.shared_expert.up_proj.weight"),
        ("blocks.{i}.moe.shared.down_DF",    "model.layers.{i}.block_sparse_moe.shared_expert.down_proj.weight"),
    )
    # fmt: on

    def expert_parameters(self, width: int, hidden: int) -> int:
        return self.expert_macs(width, hidden)

    def norm_saved_bytes(self, d: int, size: int) -> int:
        # For the backward, RMSNorm saves its input and the normalized input in float32, the operand of the next
        # product, and a statistic.
        return d * (2 * FLOAT32 + size) + FLOAT32

    def attention_saved_bytes(self, q_width: int, kv_width: int, heads: int, size: int) -> int:
        # For the backward, attention saves queries and keys before and after rotation, values, the result, and a
        # statistic per head.
        return size * (3 * q_width + 3 * kv_width) + FLOAT32 * heads

    def hidden_saved_bytes(self, hidden: int, size: int) -> int:
        return 4 * hidden * size  # gate, its silu, up, their product

    def grouped_hidden_saved_bytes(self, hidden: int, size: int) -> int:
        return 2 * hidden * size  # gate and up
