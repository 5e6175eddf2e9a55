"""The vit architecture (ViT, arXiv 2010.11929): LayerNorm before attention and feed-forward layers, GELU, biases."""

from typing import ClassVar

from mhmoe_kernels.abilities import ExpertFunction
from mhmoe_ray.architectures.base import FLOAT32, Architecture


class Vit(Architecture):
    """The vit architecture."""

    expert_function: ClassVar[ExpertFunction] = "gelu"
    grouped_queries = False
    reads_tokens = False
    norms_per_block = 2
    norm_vectors = 2  # weight and bias
    attention_bias = "all"
    expert_matrices = 2  # fc1, fc2

    def expert_parameters(self, width: int, hidden: int) -> int:
        return self.expert_macs(width, hidden) + hidden + width

    def norm_saved_bytes(self, d: int, size: int) -> int:
        # LayerNorm saves its input, its output as the operand of the next product, and two statistics.
        return d * (FLOAT32 + size) + 2 * FLOAT32

    def attention_saved_bytes(self, q_width: int, kv_width: int, heads: int, size: int) -> int:
        # Attention saves queries, keys, values and the result, and a statistic per head.
        return size * (2 * q_width + 2 * kv_width) + FLOAT32 * heads

    def hidden_saved_bytes(self, hidden: int, size: int) -> int:
        return 2 * hidden * size  # GELU's input and output

    def grouped_hidden_saved_bytes(self, hidden: int, size: int) -> int:
        return hidden * size  # GELU's input
