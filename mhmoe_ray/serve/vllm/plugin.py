"""The plugin that registers this project's model with vLLM. vLLM calls `register` once in each of its processes."""

from mhmoe_ray.serve.vllm.folder import ARCHITECTURE, FORMAT


def register() -> None:
    """Register the configuration, the model and the loader. May be called more than once."""
    from transformers import AutoConfig
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.models.registry import ModelRegistry

    from mhmoe_ray.serve.vllm.loader import CheckpointLoader, MhmoeConfig

    AutoConfig.register(FORMAT, MhmoeConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: vLLM looks at the class in a process of its own, so that this one need not import CUDA.
        ModelRegistry.register_model(ARCHITECTURE, f"mhmoe_ray.serve.vllm.model:{ARCHITECTURE}")
    if FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(FORMAT)(CheckpointLoader)
