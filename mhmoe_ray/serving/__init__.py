"""The Ray Serve application: it serves a checkpoint directory, as it is, through an OpenAI-compatible HTTP API.

config.py          the configuration that the command line sends to Serve; imports neither torch nor ray
app.py             the application that Serve builds from it: replicas with one engine each
api/               routes, and the schemas of requests, responses and errors
sampling.py        the sampling parameters of an answer
sampling_fields.py their defaults, limits and texts
answer.py          text in, text out: from a prompt to pieces of the answer
detokenizer.py     turns tokens into streamed text
engine/            token ids in, token ids out, for many requests at once
vllm/              vLLM as an engine
family.py          the interface of the serving of a family of models
decoder.py         serving of decoders
batch/             answers the prompts in all rows of a file, by a Ray Data job
load.py            checks that an engine can serve a checkpoint, and loads it
ray_metrics.py     an engine's statistics as Ray metrics
"""
