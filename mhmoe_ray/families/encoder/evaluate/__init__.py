"""Evaluation of encoders.

figures.py     evaluates an encoder
meter.py       measures losses, and how much an image helps to predict its caption
retrieval.py   finds captions of images and images of captions
captions.py    scores the captions that an encoder writes
answers.py     scores answers to questions and the truth of sentences, with baselines
probe.py       classifies images by a linear probe
"""
