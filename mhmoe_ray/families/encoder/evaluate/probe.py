"""Linear probe: a classifier of images on the features of an encoder whose weights are frozen.

The probe is a logistic regression on standardized features. The weight of its L2 penalty is the one with the best
accuracy on a held-out fifth of the training images.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.score import ProbeScore
from mhmoe_ray.families.images.nearest import NearestImages

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 5
"""Inverse of the share of training images that are held out to choose the weight of the L2 penalty."""
STEPS = 100
"""Largest number of iterations of L-BFGS, which fits the probe."""


def classify(
    training_features: np.ndarray,
    training_images: Sequence[bytes],
    training_classes: Sequence[bytes],
    features: np.ndarray,
    images: Sequence[bytes],
    classes: Sequence[bytes],
) -> ProbeScore:
    """Return the accuracies with which a linear probe and its baseline, the nearest training image, classify images.

    Features are (images, values). An image whose class no training image has counts as wrong. Fewer than `HELD_OUT`
    training images are a DataError.
    """
    numbers = {name: number for number, name in enumerate(sorted(set(training_classes)))}
    training_labels = np.array([numbers[name] for name in training_classes])
    labels = np.array([numbers.get(name, -1) for name in classes])
    if len(training_labels) < HELD_OUT:
        fix = "name a folder with more images"
        raise DataError("the linear probe", f"it has {len(training_labels)} images, and a probe needs {HELD_OUT}", fix)
    # The order is random, because images of a class may follow each other or come at regular distances.
    is_fitted = np.random.default_rng(0).permutation(len(training_labels)) % HELD_OUT > 0
    accuracies = {
        penalty: _accuracy(training_features, training_labels, is_fitted, ~is_fitted, len(numbers), penalty)
        for penalty in PENALTIES
    }
    best_penalty = max(accuracies, key=lambda penalty: accuracies[penalty])
    all_features = np.concatenate([training_features, features])
    is_training = np.arange(len(all_features)) < len(training_features)
    accuracy = _accuracy(
        all_features, np.concatenate([training_labels, labels]), is_training, ~is_training, len(numbers), best_penalty
    )
    scores = NearestImages(training_images).scores(images, training_labels, len(numbers))
    largest_class = np.bincount(training_labels).argmax()
    return ProbeScore(
        training_images=len(training_images),
        images=len(images),
        classes=len(numbers),
        accuracy=accuracy,
        baseline=float(np.mean(scores.argmax(1) == labels)),
        largest_class=float(np.mean(labels == largest_class)),
    )


def _accuracy(
    features: np.ndarray, labels: np.ndarray, is_fitted: np.ndarray, is_tested: np.ndarray, classes: int, penalty: float
) -> float:
    mean, scale = features[is_fitted].mean(0), np.maximum(features[is_fitted].std(0), 1e-6)
    feature_NV = torch.from_numpy(((features - mean) / scale).astype(np.float32))
    weight_CV = _fit(feature_NV[is_fitted], torch.from_numpy(labels[is_fitted]), classes, penalty)
    predicted = (_with_constant(feature_NV[is_tested]) @ weight_CV.T).argmax(1)
    return float((predicted == torch.from_numpy(labels[is_tested])).float().mean())


def _fit(feature_NV: Tensor, label_N: Tensor, classes: int, penalty: float) -> Tensor:
    """Return the weights of a logistic regression, (classes, values + 1), with the constant term last."""
    feature_NV = _with_constant(feature_NV)
    weight_CV = torch.zeros(classes, feature_NV.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CV], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(feature_NV @ weight_CV.T, label_N) + penalty * weight_CV.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight_CV.detach()


def _with_constant(feature_NV: Tensor) -> Tensor:
    return torch.cat([feature_NV, torch.ones(len(feature_NV), 1)], 1)
