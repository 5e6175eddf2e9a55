"""The Ray Serve application: a checkpoint directory as it lies behind OpenAI-compatible HTTP.

config.py     what the command line sends to Serve; imports neither torch nor ray
app.py        what Serve builds from it: one deployment, one engine per replica
routes.py     HTTP routes
protocol.py   shapes of requests, answers and errors
engine.py     prompt in, pieces of text out
sampling.py   the next token from logits
text.py       tokens to text that is never taken back
load.py       checkpoint and tokenizer from disk
"""
