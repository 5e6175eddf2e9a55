"""Train, inspect and serve Multi-Head Mixture-of-Experts language models on Ray."""

__version__ = "0.1.0"
