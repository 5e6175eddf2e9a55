"""The vision model: a vision transformer with tasks that share its blocks and its experts.

vision.py     the trunk, the micro-batch, and the losses of all tasks
stem.py       patches of images, with positions
pyramid.py    feature maps of several scales from the single map of patches
detector.py   region proposals, boxes with classes, and masks
"""

from mhmoe_ray.families.vision.model.detector import Detection, Objects, paste_mask
from mhmoe_ray.families.vision.model.vision import Features, TaskBatch, Vision, VisionBatch

__all__ = ["Detection", "Features", "Objects", "TaskBatch", "Vision", "VisionBatch", "paste_mask"]
