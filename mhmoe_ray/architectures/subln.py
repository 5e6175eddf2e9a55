"""The subln architecture (SubLN, arXiv 2210.06423): LayerNorm also inside attention and feed-forward layers, and xPos
positions, GELU, biases, and embeddings scaled by sqrt(d), as in the models of arXiv 2404.15045."""

from collections.abc import Mapping
from typing import ClassVar

from mhmoe_kernels.abilities import ExpertFunction, KernelName
from mhmoe_ray.architectures.base import FLOAT32, Architecture


class Subln(Architecture):
    """The subln architecture."""

    expert_function: ClassVar[ExpertFunction] = "gelu_subln"
    grouped_queries = False
    # xPos scales keys by up to (7/2)^(1/512) per position, which overflows float32 some 3,500 positions beyond this
    # length. The rotated keys themselves need that margin below the largest float32.
    longest_sequence = 32_768
    norms_per_block = 3  # the third lies inside attention
    norm_vectors = 2  # weight and bias
    attention_bias = "all"
    expert_matrices = 2  # fc1, fc2
    dense_launches = 95
    mixture_launches: ClassVar[Mapping[KernelName, int]] = {"grouped_gemm": 116, "triton": 118}

    # fmt: off
    tensor_names = (
        ("blocks.{i}.ffn.fc1_FD", "model.layers.{i}.mlp.fc1.weight"),
        ("blocks.{i}.ffn.fc1_bias_F", "model.layers.{i}.mlp.fc1.bias"),
        ("blocks.{i}.ffn.norm_weight_F", "model.layers.{i}.mlp.ffn_layernorm.weight"),
        ("blocks.{i}.ffn.norm_bias_F", "model.layers.{i}.mlp.ffn_layernorm.bias"),
        ("blocks.{i}.ffn.fc2_DF", "model.layers.{i}.mlp.fc2.weight"),
        ("blocks.{i}.ffn.fc2_bias_D", "model.layers.{i}.mlp.fc2.bias"),
        ("blocks.{i}.moe.experts.fc1_EFD", "model.layers.{i}.block_sparse_moe.experts.{e}.fc1.weight"),
        ("blocks.{i}.moe.experts.fc1_bias_EF", "model.layers.{i}.block_sparse_moe.experts.{e}.fc1.bias"),
        ("blocks.{i}.moe.experts.norm_weight_EF", "model.layers.{i}.block_sparse_moe.experts.{e}.ffn_layernorm.weight"),
        ("blocks.{i}.moe.experts.norm_bias_EF", "model.layers.{i}.block_sparse_moe.experts.{e}.ffn_layernorm.bias"),
        ("blocks.{i}.moe.experts.fc2_EDF", "model.layers.{i}.block_sparse_moe.experts.{e}.fc2.weight"),
        ("blocks.{i}.moe.experts.fc2_bias_ED", "model.layers.{i}.block_sparse_moe.experts.{e}.fc2.bias"),
        ("blocks.{i}.moe.shared.fc1_FD", "model.layers.{i}.block_sparse_moe.shared_expert.fc1.weight"),
        ("blocks.{i}.moe.shared.fc1_bias_F", "model.layers.{i}.block_sparse_moe.shared_expert.fc1.bias"),
        ("blocks.{i}.moe.shared.norm_weight_F", "model.layers.{i}.block_sparse_moe.shared_expert.ffn_layernorm.weight"),
        ("blocks.{i}.moe.shared.norm_bias_F", "model.layers.{i}.block_sparse_moe.shared_expert.ffn_layernorm.bias"),
        ("blocks.{i}.moe.shared.fc2_DF", "model.layers.{i}.block_sparse_moe.shared_expert.fc2.weight"),
        ("blocks.{i}.moe.shared.fc2_bias_D", "model.layers.{i}.block_sparse_moe.shared_expert.fc2.bias"),
    )
    # fmt: on

    def expert_parameters(self, width: int, hidden: int) -> int:
        # In addition to the matrices there are two biases, and the weight and bias of the inner norm.
        return self.expert_macs(width, hidden) + 3 * hidden + width

    def norm_saved_bytes(self, d: int, size: int) -> int:
        # For the backward, LayerNorm saves its input, its output as the operand of the next product, and two
        # statistics.
        return d * (FLOAT32 + size) + 2 * FLOAT32

    def attention_saved_bytes(self, q_width: int, kv_width: int, heads: int, size: int) -> int:
        # Attention saves queries and keys before and after rotation, values, and the result before and after the inner
        # norm, and also a statistic per head and two of the norm.
        return size * (4 * q_width + 3 * kv_width) + FLOAT32 * (heads + 2)

    def hidden_saved_bytes(self, hidden: int, size: int) -> int:
        return 3 * hidden * size + 2 * size  # GELU's input and output, the norm's result and its two statistics

    def grouped_hidden_saved_bytes(self, hidden: int, size: int) -> int:
        return hidden * size  # GELU's input
