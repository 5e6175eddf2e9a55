"""Training objectives: how a micro-batch becomes input of the model, which losses it has, and how they are validated.

base.py         the interface of an objective
next_token.py   decoders: each token is predicted from those before it
parts.py        base class of objectives whose micro-batches have several parts, each with losses of its own
masked.py       encoders: hidden patches and tokens are predicted, and images are matched with their texts
tasks.py        vision models: images are classified, and objects are found in them
"""

import numpy as np

from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.model.vision import Vision
from mhmoe_ray.train.objectives.base import Environment, LossSums, Objective, Validation
from mhmoe_ray.train.objectives.masked import Masked
from mhmoe_ray.train.objectives.next_token import MicroBatch, NextToken
from mhmoe_ray.train.objectives.tasks import Tasks

__all__ = [
    "Environment",
    "LossSums",
    "Masked",
    "MicroBatch",
    "NextToken",
    "Objective",
    "Tasks",
    "Validation",
    "build_objective",
]


def build_objective(
    environment: Environment, model: Trunk, start_token: int | None, codebook: np.ndarray | None = None
) -> NextToken | Masked | Tasks:
    """Return the training objective of a run, which depends on the kind of its model.

    Args:
        environment: spec, device and functions of this rank.
        model: model of this rank.
        start_token: the token that precedes every document, for a decoder with `document_masks`.
        codebook: vectors of the codebook of image patches, for an encoder with `image_targets: codebook`.
    """
    if isinstance(model, Vision):
        return Tasks(environment, model)
    if environment.spec.model.encoder is None:
        return NextToken(environment, start_token)
    return Masked(environment, codebook)
