"""OpenAI's API over HTTP.

app.py           all routes; the small ones, and / (page.html), are here
completions.py   /v1/completions and /v1/chat/completions
access.py        who may ask, how much a minute, and how large a request may be
stream.py        pieces of answers: merged, counted, as events
schema.py        shapes of requests, answers and errors
service.py       what routes share
metrics.py       what /metrics says
errors.py        what clients get where there is no answer
proxy.py         the same of Serve's proxies, where no replica answered
"""
