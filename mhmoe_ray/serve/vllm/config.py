"""Our model as vLLM's configuration: a class of transformers' kind, read from a folder that stands for a checkpoint."""

from typing import Any

from transformers import PreTrainedConfig

from mhmoe_ray.serve.vllm.folder import FORMAT


class MhmoeConfig(PreTrainedConfig):
    """What `folder.write_folder` writes: sizes under the names that vLLM looks for, and beside them what is ours."""

    model_type = FORMAT

    checkpoint: str = ""
    """A location."""
    model: dict[str, Any] | None = None
    """The `model` section of the checkpoint's manifest."""

    vocab_size: int = 0
    """Tokens that the tokenizer has; the model may have more rows, which no answer takes."""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    num_experts: int = 0
    max_position_embeddings: int = 0
    rope_parameters: dict[str, Any] | None = None
