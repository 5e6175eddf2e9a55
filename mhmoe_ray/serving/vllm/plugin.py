"""The plugin that registers this project's model with vLLM. vLLM calls `register` in each of its processes.

With this plugin, `vllm serve FOLDER` serves an exported MH-MoE model like any other. Importing `mhmoe_ray` registers
the class of the model's configuration with transformers.
"""

from functools import cache

from mhmoe_ray.serving.vllm.folder import ARCHITECTURE, LOAD_FORMAT


@cache
def register() -> None:
    """Register this project's model and the loader of its checkpoints with vLLM. Further calls have no effect."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.registry import ModelRegistry

    # The class is registered by name, so that vLLM inspects it in another process and this one need not import CUDA.
    ModelRegistry.register_model(ARCHITECTURE, f"mhmoe_ray.serving.vllm.model:{ARCHITECTURE}")

    from mhmoe_ray.serving.vllm.loader import CheckpointLoader

    register_model_loader(LOAD_FORMAT)(CheckpointLoader)
