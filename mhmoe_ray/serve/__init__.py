"""The Ray Serve application: a checkpoint directory as it lies behind OpenAI-compatible HTTP.

config.py          what the command line sends to Serve; imports neither torch nor ray
app.py             what Serve builds from it: one deployment, one engine per replica
api/               routes, and the shapes of requests, answers and errors
answer.py          prompt in, pieces of text out
chat_template.py   conversations to prompts
detokenizer.py     tokens to text that is never taken back
engine/            token ids in, token ids out, for many requests at once
vllm/              vLLM as an engine
load.py            from a checkpoint to what answers; engines by name
ray_metrics.py     what an engine counts, as Ray's metrics
"""
