"""Spec of a small run that trains a vision model, with adaptive tasks."""

import copy

import yaml

from tests.support.visions import VISION

STEPS = 8
ADAPTIVE = {"largest": 3, "interval": 2, "patience": 1, "batches": 2, "first_loss": 1e-6, "first_step": 0}
"""Options of the adaptive rule with which each task raises its number of experts and then takes the raise back.

No loss is below `first_loss`, so the raise is at the first validation of the rule, and is taken back at the second one.
"""


def write_spec(folder, workers, **sections):
    tree = copy.deepcopy(VISION)
    tree["storage"] = "runs"
    tree["model"]["vision"]["adaptive"] = ADAPTIVE
    tree["model"]["moe"] |= {"noise": 1.0, "balance": "importance_load"}
    tree["data"] |= {"prepared": "prepared", "validation_fraction": 0.2}
    tree["data"]["sources"]["drawings"]["path"] = "raw/classes"
    tree["data"]["sources"]["scenes"]["path"] = "raw/scenes/annotations/instances_*.json"
    tree["train"] |= {"steps": STEPS, "validate_every": 4, "checkpoint_every": 2}
    tree["cluster"] = {"workers": workers, "ep": min(2, workers)}
    for name, section in sections.items():
        tree[name] |= section
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
