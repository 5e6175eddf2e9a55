"""The multiway encoder of images and texts (BEiT-3, arXiv 2208.10442), with experts for both.

A micro-batch has groups of samples: images, texts, or pairs of an image and a text. All images of a micro-batch are one
tensor and all texts another. A layer has weights for each of the two, called modalities; attention alone mixes the two
halves of a pair, and the experts of a layer take the rows of all groups in one call:

    images (N, P + 1, M)  norm, projections |  attention of   | norm, feed-forward of images  + | experts of
    texts  (N, T, M)      norm, projections |  each group     | norm, feed-forward of texts   + | both

An image begins with a position of its own, which is never hidden and stands for the image as a whole; a text begins
with its start token.

batch.py    micro-batches: groups of images, texts, or pairs
samples.py  the samples over which attention is: joining and splitting their halves, and masks
block.py    a block: weights for images and for texts, joint attention, and experts for both
model.py    embeddings, blocks and losses
match.py    the head that matches images with texts
captions.py the captions of images, token by token
"""

from mhmoe_ray.model.encoder.batch import EncoderBatch, Group, GroupSize
from mhmoe_ray.model.encoder.block import Branch
from mhmoe_ray.model.encoder.model import Encoded, Encoder

__all__ = ["Branch", "Encoded", "Encoder", "EncoderBatch", "Group", "GroupSize"]
