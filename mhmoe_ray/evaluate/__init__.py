"""Evaluation of a checkpoint: its losses and its routing on held-out text, on any other text, and on tasks.

    request.py      the request for an evaluation, its stored result, and counts of routes
    score.py        scores of texts (loss, perplexity and bits per byte), of encoders and of vision models
    context.py      types for the input of an evaluation and for its result
    encoder.py      measures an encoder's losses, and how much an image helps to predict its caption
    retrieval.py    finds captions of images and images of captions
    captions.py     scores the captions that an encoder writes
    probe.py        classifies images by a linear probe
    nearest.py      finds the nearest training images in pixels, the baseline of retrieval, captions and classes
    decoder_figures.py  evaluates a decoder
    encoder_figures.py  evaluates an encoder
    vision.py       evaluates a vision model
    objects.py      average precision of objects in images
    measure.py      cuts text into samples, and measures a model's losses and routes over them
    mixture.py      text of unknown domain, predicted by all experts of a DEMix model together
    activation.py   statistics on the use of experts, from counts of routes
    harness.py      runs EleutherAI's lm-eval on a checkpoint (extra `eval`)
    answer.py       computes everything that a request asks for
    job.py          the Ray job that computes an evaluation on a cluster

Routing is dropless in every evaluation, as in serving.
"""
