"""OpenAI's API over HTTP.

app.py           the FastAPI application with all routes; the small routes and / (page.html) are defined here
completions.py   /v1/completions and /v1/chat/completions
access.py        API keys, limits per minute, and the largest size of a request
stream.py        pieces of answers: merged, counted, and streamed as events
schema.py        schemas of requests, responses and errors
service.py       what the routes share: the model, its limits, tokenizing and answering
metrics.py       the statistics behind /metrics in Prometheus' format
errors.py        error responses
proxy.py         error responses of Serve's proxies, if no replica answered
"""
