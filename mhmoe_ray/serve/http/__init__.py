"""OpenAI's API over HTTP.

app.py           all routes; the small ones are here
completions.py   /v1/completions
chat.py          /v1/chat/completions
page.py          / (page.html)
metrics.py       what /metrics says
access.py        who may ask, how much, how large
stream.py        pieces of answers: merged, counted, as events
schema.py        shapes of requests, answers and errors
service.py       what routes share
errors.py        what clients get where there is no answer
"""
