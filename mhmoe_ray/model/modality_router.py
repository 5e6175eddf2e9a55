"""The router with scores for each modality: patches of images and tokens of texts choose among the same experts."""

import torch
from torch import Tensor

from mhmoe_ray.model.router import BaseScores, Router, Scores, build_scores


class ModalityRouter(Router):
    """Router of one layer that computes the logits of patches and those of tokens by different weights.

    All else is over the rows of both: the choice of experts, their capacity, and the load balancing loss.
    """

    def _build_scores(self, width: int) -> None:
        self.image, self.text = build_scores(width, self.moe), build_scores(width, self.moe)

    def _scores_of(self, image_rows: int) -> Scores:
        return _SplitScores(self.image, self.text, image_rows)


class _SplitScores:
    """Logits of rows, of which the first ones are of images.

    Args:
        image: the scores of images.
        text: the scores of texts.
        image_rows: number of rows of images.
    """

    def __init__(self, image: BaseScores, text: BaseScores, image_rows: int) -> None:
        self._image, self._text, self._image_rows = image, text, image_rows

    def __call__(self, x_ND: Tensor) -> Tensor:
        return torch.cat([self._image(x_ND[: self._image_rows]), self._text(x_ND[self._image_rows :])])

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        n = self._image_rows
        return torch.cat(
            [
                self._image.balance_probabilities(x_ND[:n], probability_NE[:n]),
                self._text.balance_probabilities(x_ND[n:], probability_NE[n:]),
            ]
        )
