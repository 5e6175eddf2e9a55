"""The plugin that registers this project's model with vLLM. vLLM calls `register` in each of its processes."""

from mhmoe_ray.serve.vllm.folder import ARCHITECTURE, FORMAT


def register() -> None:
    """Register the configuration, the model and the loader. Further calls have no effect."""
    from transformers import AutoConfig
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.models.registry import ModelRegistry

    from mhmoe_ray.serve.vllm.loader import CheckpointLoader, MhmoeConfig

    AutoConfig.register(FORMAT, MhmoeConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: vLLM then inspects the class in another process, so that this one need not import CUDA.
        ModelRegistry.register_model(ARCHITECTURE, f"mhmoe_ray.serve.vllm.model:{ARCHITECTURE}")
    if FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(FORMAT)(CheckpointLoader)
