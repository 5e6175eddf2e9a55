"""OpenAI's API over HTTP.

app.py           all routes; the small ones are here
completions.py   /v1/completions
completions.py          /v1/chat/completions
app.py          / (page.html)
serve/metrics.py       what /metrics says
access.py        who may ask, and how large a request may be
access.py        how much each client may have a minute
stream.py        pieces of answers: merged, counted, as events
schema.py        shapes of requests, answers and errors
service.py       what routes share
errors.py        what clients get where there is no answer
proxy.py         the same of Serve's proxies, where no replica answered
"""
