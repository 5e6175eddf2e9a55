"""Evaluation of a checkpoint: its losses and its routing on held-out text, on any other text, and on tasks.

    request.py      the request for an evaluation, its stored result, and counts of routes
    score.py        scores of texts (loss, perplexity and bits per byte), of encoders and of vision models
    served_routes.py  compares the experts that a server reports with those of the model
    decoder_figures.py  evaluates a decoder
    measure.py      cuts text into samples, and measures a model's losses and routes over them
    mixture.py      text of unknown domain, predicted by all experts of a DEMix model together
    activation.py   statistics on the use of experts, from counts of routes
    harness.py      runs EleutherAI's lm-eval on a checkpoint (extra `eval`)
    answer.py       computes all that a request asks for, by the function of the model's family
    job.py          the Ray job that computes an evaluation on a cluster

Routing is dropless in every evaluation, as in serving.
"""
