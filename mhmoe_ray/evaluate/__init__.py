"""Evaluation of a checkpoint: its losses and its routing on held-out text, on any other text, and on tasks.

    request.py      the request, the evaluation that answers it, and counts of routes
    score.py        scores: loss, perplexity and bits per byte of texts; those of encoders and of vision models
    context.py      what is evaluated, and the form of the answer
    encoder.py      measures an encoder's losses, and the value of the image for the text of a pair
    retrieval.py    finds captions of images and images of captions
    captions.py     scores the captions that an encoder writes
    probe.py        classifies images by a linear probe
    nearest.py      nearest images of the training in pixels, the baseline of these three
    decoder_figures.py  computes all figures of a decoder
    encoder_figures.py  computes all figures of an encoder
    vision.py       computes all figures of a vision model
    objects.py      average precision of objects in images
    measure.py      cuts text into samples, and measures a model's losses and routes over them
    mixture.py      text of unknown domain, predicted by all experts of a DEMix model together
    activation.py   figures on the use of experts, from counts of routes
    harness.py      runs EleutherAI's lm-eval on a checkpoint (extra `eval`)
    answer.py       computes everything that a request asks for
    job.py          the Ray job that computes an evaluation on a cluster

Routing is dropless throughout, as in serving.
"""
