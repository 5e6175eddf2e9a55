"""Record the own times of ranks in healthy runs, from which the thresholds of train/stragglers.py come.

`python -m tests.train.record_times > tests/train/healthy_times.json`
"""

import json

from mhmoe_ray.spec import RunSpec
from tests.support.ranks import run_ranks
from tests.support.specs import tiny_spec
from tests.train.jobs import build_trainer, rank_batches

STEPS = 200


def own_times(spec: RunSpec) -> list[float]:
    """Return this rank's own time in each step, in seconds."""
    trainer, times = build_trainer(spec), []
    for step in range(STEPS):
        sums = trainer.accumulate(rank_batches(spec, step, trainer))
        trainer.update(sums)
        times.append(round(sums.own_seconds, 4))
    return times


def main() -> None:
    runs = {}
    for workers, ep in ((2, 2), (2, 1), (4, 4), (4, 1)):
        times = run_ranks(workers, own_times, tiny_spec(cluster={"workers": workers, "ep": ep}))
        runs[f"workers {workers}, ep {ep}"] = list(zip(*times, strict=True))
    print("{\n" + ",\n".join(f'"{name}": {json.dumps(times)}' for name, times in runs.items()) + "\n}")


if __name__ == "__main__":
    main()
