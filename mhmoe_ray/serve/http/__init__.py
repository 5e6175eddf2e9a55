"""OpenAI's API over HTTP.

app.py           all routes; the small ones are here
completions.py   /v1/completions
schema.py        shapes of requests, answers and errors
service.py       what routes share
errors.py        what clients get where there is no answer
"""
