"""The plugin that registers this project's model with vLLM. vLLM calls `register` in each of its processes.

With it, `vllm serve FOLDER` serves an exported MH-MoE model like any other. transformers gets the configuration's class
when this package is imported.
"""

from functools import cache

from mhmoe_ray.serving.vllm.folder import ARCHITECTURE, LOAD_FORMAT


@cache
def register() -> None:
    """Register the model, and the loader of runs' checkpoints. Further calls have no effect."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models.registry import ModelRegistry

    # By name: vLLM then inspects the class in another process, so that this one need not import CUDA.
    ModelRegistry.register_model(ARCHITECTURE, f"mhmoe_ray.serving.vllm.model:{ARCHITECTURE}")

    from mhmoe_ray.serving.vllm.loader import CheckpointLoader

    register_model_loader(LOAD_FORMAT)(CheckpointLoader)
