"""How evenly a layer's routes are spread over its experts. Without torch, which what reads runs need not wait for."""

import math

import numpy as np


def load(count_LE: np.ndarray) -> np.ndarray:
    """The shares of routes that a layer's experts got, times E: 1 is uniform; 0 throughout where there are no routes.

    Args:
        count_LE: routes per layer and expert.

    Returns:
        (L, E), float64.
    """
    return np.asarray(_share(count_LE) * count_LE.shape[1])


def load_entropy(count_LE: np.ndarray) -> np.ndarray:
    """Entropy of the shares of routes that a layer's experts got, over the highest, log E: 1 is uniform; 0 is all to
    one of them, or no routes at all.

    Args:
        count_LE: routes per layer and expert, of at least two experts.

    Returns:
        (L,), float64.
    """
    share_LE = _share(count_LE)
    log_LE = np.log(share_LE, where=share_LE > 0, out=np.zeros_like(share_LE))
    return np.asarray(-(share_LE * log_LE).sum(1) / math.log(count_LE.shape[1]))


def _share(count_LE: np.ndarray) -> np.ndarray:
    return np.asarray(count_LE / count_LE.sum(1, keepdims=True).clip(min=1))
