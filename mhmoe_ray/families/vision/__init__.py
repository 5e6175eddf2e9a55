"""The family of vision models.

model/         the model                        router.py       its routers
plan.py        sizes and lines of plans         objective.py    the training objective
data/          samples and collator
adaptive.py    the rule that adapts how many experts each task chooses
evaluate/      accuracies and average precision
serving/       classes, objects and masks       checkpoint.py   vision models from checkpoints
"""
