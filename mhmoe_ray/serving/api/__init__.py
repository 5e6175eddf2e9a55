"""OpenAI's API over HTTP.

app.py           the FastAPI application with all routes; it defines those for health, models, tokens and statistics
pages.py         the web pages: page.html of a family at /, and chat.html at /chat, with page.css and page.js
structured.py    tools and structured answers of conversations
completions.py   /v1/completions and /v1/chat/completions
access.py        API keys, rate limits, and the largest size of a request
stream.py        merges, counts and streams the pieces of answers
schema.py        schemas of requests, responses and errors
service.py       functions that the routes share: checks, tokenizing and answering
metrics.py       the statistics behind /metrics in Prometheus' format
errors.py        error responses
proxy.py         error responses of Serve's proxies, for requests that no replica answered
"""
