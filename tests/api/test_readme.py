"""Test of the examples in mhmoe_ray/api/README.md, which run in their order as a stranger would run them."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import find_run
from mhmoe_ray.runs.events import EventKind
from mhmoe_ray.runs.metrics import METRICS, STEPS
from mhmoe_ray.runs.start import read_start

README = Path(__file__).parents[2] / "mhmoe_ray/api/README.md"
PORT = 8017
"""Port in the examples. The test takes a free one instead, because another test may use this one."""


@pytest.mark.slow  # this folder and tests/cli have quick tests of these functions
@pytest.mark.ray
def test_examples_of_the_readme_run_in_their_order(tmp_path, local_cluster):
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    assert len(examples) == 9
    code = "\n".join(examples)
    assert code.count(str(PORT)) == 1
    (tmp_path / "walk.py").write_text(code.replace(str(PORT), str(free_ports(1)[0])))
    environment = {name: value for name, value in os.environ.items() if name != "MHMOE_STORAGE"}
    process = subprocess.run(
        [sys.executable, "walk.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    for line in ("stopped", "30", "finished finished", "2 torch.Size([4, 300])", "step_00000010.1 1"):
        assert line in lines
    [score_line] = [line for line in lines if line.startswith("held-out text: loss")]
    # The trained model predicts the text better than one that knows nothing but the size of the vocabulary.
    assert float(re.search(r"loss ([\d.]+)", score_line)[1]) < math.log(300) - 1
    # Token ids, the service and the exported model give the same greedy answer as the run's text; and the model of step
    # 0 has the logits of the model that it starts from.
    assert lines.count("True") == 4
    assert "False" not in lines
    assert lines[-1] == "spec sums: unknown key 'train.stepz'; did you mean 'steps'?"
    run, branch, upcycled = (find_run(name, tmp_path / "runs") for name in ("sums", "branch", "upcycled"))
    assert f"{run.id} finished 20" in lines
    losses = [line[metrics.LOSS] for line in history.read(run)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1
    assert history.read(branch)[0][metrics.LOSS] == pytest.approx(losses[20], abs=0.5)
    assert [ancestor.step for ancestor in read_start(branch).ancestors] == [20]
    assert upcycled.spec().model.moe.d_shared == 64
    assert (tmp_path / "exported" / "config.json").exists()
    rows = readme_rows()
    for other_run in (run, branch, upcycled):
        for line in history.read(other_run):
            assert line.keys() <= rows.keys()
        for event in events.read(other_run):
            named_keys = re.findall(r"`(\w+)`", rows[event["event"]])
            assert event["event"] in ("prepared", "started") or event.keys() <= {"time", "event", *named_keys}


def readme_rows() -> dict[str, str]:
    """Return the rows of the README's tables of metrics and of events by the name in their first cell."""
    section = README.read_text().split("## Metrics and events")[1]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M))


def test_the_tables_have_all_metrics_and_events():
    rows = readme_rows()
    # Only Prometheus has the values of each layer and expert, and the number of steps of the complete run.
    lines = {name: metric.help for name, metric in METRICS.items() if metric.scope not in ("layer", "expert")}
    del lines[STEPS]
    assert {name: rows[name] for name in lines} == lines
    assert rows.keys() - lines.keys() == {*get_args(EventKind), "event"}
