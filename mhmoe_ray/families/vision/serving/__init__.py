"""Serving of vision models: classes of images, and objects with their boxes and masks.

request.py  requests to the engine, and its answers
engine.py   runs the model on the waiting images of a task together, in one forward pass
answer.py   reads images, and returns the names of classes, and objects with boxes in pixels of the images
routes.py   /image-classification, /object-detection, /image-segmentation and /routes
deployment.py   checks, loading and routes of a served vision model; its web page is page.html
"""
