"""Training objectives: how a micro-batch becomes input of the model, which losses it has, and how they are validated.

base.py         the interface of an objective
next_token.py   decoders: each token is predicted from those before it
dpo.py          decoders: chosen answers become likelier than rejected ones
"""

from mhmoe_ray.train.objectives.base import Environment, LossSums, ModelArguments, Objective, Validation
from mhmoe_ray.train.objectives.next_token import MicroBatch, NextToken

__all__ = ["Environment", "LossSums", "MicroBatch", "ModelArguments", "NextToken", "Objective", "Validation"]
