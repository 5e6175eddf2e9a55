"""The family of vision models.

model/         the model                        router.py       its routers
sizes.py       sizes for the planner            view.py         lines and tables of commands
data/          samples and collator             objective.py    the training objective
adaptive.py    the rule that adapts how many experts each task chooses
evaluate/      accuracies and average precision
serving/       classes, objects and masks       checkpoint.py   vision models from checkpoints
"""
