"""Training objectives: how a micro-batch becomes input of the model, which losses it has, and how they are validated.

base.py         the interface of an objective
next_token.py   decoders: each token is predicted from those before it
parts.py        base class of objectives whose micro-batches have several parts, each with losses of its own
masked.py       encoders: hidden patches and tokens are predicted, and images are matched with their texts
tasks.py        vision models: images are classified, and objects are found in them
"""

from mhmoe_ray.train.objectives.base import Environment, LossSums, ModelArguments, Objective, Validation
from mhmoe_ray.train.objectives.next_token import MicroBatch, NextToken

__all__ = ["Environment", "LossSums", "MicroBatch", "ModelArguments", "NextToken", "Objective", "Validation"]
