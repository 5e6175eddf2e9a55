"""Serving of encoders: vectors of images and texts, and captions of images.

request.py  requests to the engine, and its answers
engine.py   computes the outputs of all requests together, in one forward pass
names.py    image captions that the web page proposes as names of images
answer.py   images and texts in, vectors and captions out
routes.py   /v1/embeddings, /rerank, /routes, and captions at /v1/chat/completions
deployment.py   checks, loading and routes of a served encoder; its web page is page.html
"""
