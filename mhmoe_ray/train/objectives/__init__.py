"""Objectives: what a micro-batch is to the model, its losses, and their validation.

base.py         the interface of an objective
next_token.py   decoders: each token is predicted from those before it
masked.py       encoders: hidden patches and tokens are predicted, and images are matched with their texts
"""

import numpy as np

from mhmoe_ray.train.objectives.base import Environment, LossSums, Objective, Validation
from mhmoe_ray.train.objectives.masked import Masked
from mhmoe_ray.train.objectives.next_token import MicroBatch, NextToken

__all__ = ["Environment", "LossSums", "Masked", "MicroBatch", "NextToken", "Objective", "Validation", "build_objective"]


def build_objective(
    environment: Environment, start_token: int | None, codebook: np.ndarray | None = None
) -> NextToken | Masked:
    """Return the objective of a run.

    Args:
        environment: environment of this rank.
        start_token: the token that precedes every document, for a decoder with `document_masks`.
        codebook: entries of the codebook, for an encoder with image_targets codebook.
    """
    if environment.spec.model.encoder is None:
        return NextToken(environment, start_token)
    return Masked(environment, codebook)
