"""Serving of encoders: vectors of images and texts, and captions of images.

request.py  requests to the engine, and its answers
engine.py   computes the outputs of all requests together, in one forward pass
names.py    image captions that the web page proposes as names of pictures
answer.py   images and texts in, vectors and captions out
"""
