"""Code for images that encoders and vision models share.

patches.py          patches of images
part_losses.py      losses of the parts of a micro-batch
part_objective.py   base class of objectives whose micro-batches have several parts, each with losses of its own
crops.py            crops of images: pure functions of (seed, part of a micro-batch, position of the sample)
nearest.py          the nearest training images in pixels, the baseline of retrieval, captions and classes
image_urls.py       decodes images of requests
routes.py           functions for routes whose requests have images
"""
