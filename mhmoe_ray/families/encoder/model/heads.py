"""The output heads that answer questions and judge sentences, with their losses (BEiT-3's fine-tuning)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPARISON_SCALE = 1e-3
"""Factor of the initial weights and biases of the head of objective `compare`, as in BEiT-3."""
ANSWER_SCORE = 0.3
"""Score that an annotator's answer adds to its class, up to 1, as in the preparation of VQAv2 that BEiT-3 uses."""


class SmallLinear(nn.Linear):
    """Linear layer whose initial values are small."""

    initial_scale = COMPARISON_SCALE


def answer_head(d: int, answers: int) -> nn.Sequential:
    """Return the head of objective `answer`: from the last block's output for the image to the logits of answers."""
    pooler = (nn.LayerNorm(d), nn.Linear(d, d), nn.Tanh())
    return nn.Sequential(*pooler, nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, answers))


def comparison_head(d: int) -> nn.Sequential:
    """Return the head of objective `compare`: from the outputs of two pairs to the logits of false and true."""
    return nn.Sequential(
        nn.LayerNorm(4 * d), SmallLinear(4 * d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), SmallLinear(2 * d, 2)
    )


def soft_scores(label_QL: Tensor, answers: int) -> Tensor:
    """Return the score of each answer to each question, (Q, answers) float32, from the classes that annotators gave."""
    counts = torch.zeros(len(label_QL), answers + 1, device=label_QL.device)
    # An answer that is no class, -1, is counted in the last column, which is left out.
    column_QL = torch.where(label_QL < 0, answers, label_QL)
    counts.scatter_add_(1, column_QL, torch.ones_like(column_QL, dtype=counts.dtype))
    return (ANSWER_SCORE * counts[:, :answers]).clamp(max=1)


def answer_losses(logit_QA: Tensor, label_QL: Tensor) -> Tensor:
    """Return the binary cross-entropy of each question, (Q,), summed over answers."""
    score_QA = soft_scores(label_QL, logit_QA.shape[1])
    return F.binary_cross_entropy_with_logits(logit_QA.float(), score_QA, reduction="none").sum(1)


def comparison_losses(logit_Q2: Tensor, label_QL: Tensor) -> Tensor:
    """Return the cross-entropy of each sentence, (Q,)."""
    return F.cross_entropy(logit_Q2.float(), label_QL[:, 0], reduction="none")
