"""Profiles of a run: profiles/step_00000012.1/ for the steps from 12 on of worker group 1, with files for each rank.

rank_0.trace.json.gz    trace of torch's profiler, for Perfetto or chrome://tracing
rank_0.memory.pickle    on a GPU, its newest allocations, for pytorch.org/memory_viz
rank_0.json             the `RankProfile`, written last
"""

import statistics
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from mhmoe_ray.planner.parts import STEP_PARTS
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location


class RankProfile(NamedTuple):
    """Mean seconds of a step of one rank, in total and by part (planner/parts.py)."""

    rank: int
    ranks: int
    step: int  # the first of the profiled steps
    steps: int
    device: str  # "cpu" or "cuda"
    seconds: float
    parts: dict[str, float]


_PROFILE = TypeAdapter(RankProfile)


def profile_folder(run: RunDir, step: int, group: int) -> Location:
    return run.profiles / f"step_{step:08d}.{group}"


def read_profile(run: RunDir, name: str) -> list[RankProfile]:
    """Return the profiles of the ranks that have written theirs; a damaged file is a RunError."""
    profiles = []
    for path in (run.profiles / name).glob("rank_*.json"):
        file_name = f"profiles/{name}/{path.name}"
        try:
            profiles.append(_PROFILE.validate_python(run.stored_state(file_name)))
        except ValidationError as e:
            raise run.damage_error(e, file_name) from e
    return sorted(profiles)


def newest_profile(run: RunDir) -> str | None:
    """Return the name of the folder of the run's newest profile, of the newest worker group's last steps."""
    names = {path.parent.name for path in run.profiles.glob("*/rank_*.json")}
    return max(names, key=lambda name: [int(n) for n in reversed(name.removeprefix("step_").split("."))], default=None)


def summarize(profiles: list[RankProfile]) -> dict[str, dict[str, Any]]:
    """Return the median over ranks and the slowest rank of each part, and of the whole step as `step`."""
    result = {}
    for part in [*STEP_PARTS, "step"]:
        seconds = [p.seconds if part == "step" else p.parts.get(part, 0.0) for p in profiles]
        if any(seconds):
            slowest = max(range(len(profiles)), key=seconds.__getitem__)
            result[part] = {
                "median": statistics.median(seconds), "slowest": seconds[slowest], "rank": profiles[slowest].rank
            }  # fmt: skip
    return result
