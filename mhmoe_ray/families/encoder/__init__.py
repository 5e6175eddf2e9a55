"""The family of encoders of images and texts.

model/         the model                        router.py       its routers
sizes.py       sizes for the planner            view.py         lines and tables of commands
data/          samples, collator and codebook   objective.py    the training objective
evaluate/      losses, retrieval, captions and a linear probe
serving/       vectors, rankings and captions   checkpoint.py   encoders from checkpoints
"""
