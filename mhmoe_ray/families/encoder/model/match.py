"""The output head that compares images with texts by the cosine of two vectors (CLIP, arXiv 2103.00020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_MATCH_SCALE = 100.0
"""Upper limit of the learned factor of cosines in the contrastive loss, as in CLIP."""


class MatchHead(nn.Module):
    """Head of objective `contrastive`: the cosines of projected images and texts, times a learned factor."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(d_model, width, bias=False), nn.Linear(d_model, width, bias=False)
        # The parameter is a vector of one element, because neither FSDP2 nor DeepSpeed accepts scalars.
        self.log_scale = nn.Parameter(torch.empty(1))

    def image_vectors(self, image_BM: Tensor) -> Tensor:
        """Return a vector of length 1 for each image, (B, W) float32, from the encoder's output at position 0."""
        return F.normalize(self.image(image_BM).float())

    def text_vectors(self, text_BM: Tensor) -> Tensor:
        """Return a vector of length 1 for each text, (B, W) float32, from the encoder's output at its start token."""
        return F.normalize(self.text(text_BM).float())

    def forward(self, image_BM: Tensor, text_BM: Tensor) -> Tensor:
        """Return the contrastive loss of each pair, in nats: the mean of the cross-entropies of choosing the pair's
        text among all texts and its image among all images."""
        image_BW, text_BW = self.image_vectors(image_BM), self.text_vectors(text_BM)
        if not len(image_BM):
            return image_BW.new_empty(0)
        with torch.autocast(image_BM.device.type, enabled=False):
            scale = self.log_scale.float().exp().clamp(max=MAX_MATCH_SCALE)
            logits_BB = scale * image_BW @ text_BW.T
        target_B = torch.arange(len(logits_BB), device=logits_BB.device)
        losses = (F.cross_entropy(logits, target_B, reduction="none") for logits in (logits_BB, logits_BB.T))
        return torch.stack([*losses]).mean(0)
