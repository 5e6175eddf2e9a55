"""The family of encoders of images and texts.

model/         the model                        router.py       its routers
plan.py        sizes and lines of plans         objective.py    the training objective
data/          samples, collator and codebook
evaluate/      losses, retrieval, captions, answers and a linear probe
serving/       vectors, rankings and captions   checkpoint.py   encoders from checkpoints
"""
