"""The multiway encoder of images and texts (BEiT-3, arXiv 2208.10442), with experts for both.

A micro-batch has groups of samples: images, texts, or pairs of an image and a text. All images of a micro-batch are one
tensor, and all texts are another. A layer has separate weights for images and for texts, the two modalities. Only
attention mixes the two halves of a pair. The experts of a layer compute the rows of all groups in one call:

    images (N, P + 1, M)  norm, projections |  attention of   | norm, feed-forward of images  + | experts of
    texts  (N, T, M)      norm, projections |  each group     | norm, feed-forward of texts   + | both

An image begins with an extra position, which stands for the image as a whole and is never hidden. A text begins with
its start token.

batch.py    micro-batches: groups of images, texts, or pairs
samples.py  the samples over which attention runs: joining images and texts, splitting them again, and masks
block.py    a block: weights for images and for texts, joint attention, and experts for both
encoder.py  embeddings, blocks and losses
match.py    the head that compares images with texts
heads.py    the heads that answer questions and judge sentences
captions.py the captions of images, token by token
"""

from mhmoe_ray.families.encoder.model.batch import EncoderBatch, Group, GroupSize
from mhmoe_ray.families.encoder.model.encoder import Encoded, Encoder

__all__ = ["Encoded", "Encoder", "EncoderBatch", "Group", "GroupSize"]
