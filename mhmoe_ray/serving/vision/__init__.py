"""Serving of vision models: classes of images, and objects with their boxes and masks.

request.py  requests to the engine, and its answers
engine.py   computes images of all requests of a task together, in one forward pass
answer.py   images in, classes and objects out, in the pixels of the images
"""
