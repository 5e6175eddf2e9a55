"""Train, inspect and serve Multi-Head Mixture-of-Experts language models on Ray.

Importing this package makes transformers' auto classes load exported MH-MoE models, whichever is imported first.
"""

from mhmoe_ray.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
