"""The data pipeline: it turns raw text and pictures into the micro-batches of a training step.

sources/             reads raw text and pictures of any format, one document at a time
inspect/             surveys raw text and reports its problems
tokenizer/           turns text into token ids
chat/                renders conversations with a chat template, and marks the assistant's tokens
prepare/             the job that runs once: sources -> tokenizer -> packed samples
shards/              the prepared data: a folder of packed samples and its manifest
order/               the order of samples: a pure function of (seed, position)
images.py            checks image files, and decodes them
jpeg.py              counts the scans of a JPEG file without decoding it
crops.py             crops of images: pure functions of (seed, part, position)
masking.py           masks of patches and tokens, which are pure functions, too
row_order.py         rows of images in the order of a training
encoder_samples.py   samples of an encoder: crops, tokens and masks, part by part
encoder_batches.py   micro-batches of an encoder: tensors and targets
annotations.py       classes and objects of images, and how they are stored
vision_samples.py    samples of a vision model: images with classes or objects, task by task
vision_columns.py    these samples in memory, and as columns of the stream
vision_batches.py    micro-batches of a vision model: tensors
stored_pixels.py     boxes and masks of a vision model in the pixels of stored images
domains.py           names of domains and languages
stream.py            streams the shards in that order to the workers of a training
"""
