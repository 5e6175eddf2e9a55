"""Evaluation of vision models.

figures.py   evaluates a vision model
objects.py   average precision of objects in images
"""
