"""Profiles of a run's steps: ask its workers for one, and compare the times of the parts with those of the plan."""

import time
from functools import partial
from typing import Any

from mhmoe_ray.api import attempts
from mhmoe_ray.api.defaults import OnNote
from mhmoe_ray.api.plan import estimate_step
from mhmoe_ray.cluster.runs import recorded_outcome
from mhmoe_ray.errors import RunError
from mhmoe_ray.planner.placement import Node, build_layout
from mhmoe_ray.runs import events, profiles
from mhmoe_ray.runs.directory import RunDir, last_attempt

WRITE_SECONDS = 120.0
"""Seconds to wait for the files of all ranks, after the first rank has written its own."""


def profile_run(run: RunDir, steps: int, on_note: OnNote) -> dict[str, Any]:
    """Return a profile of a run, as `Run.profile`."""
    last_attempt(run)  # an imported run has none
    name = profiles.newest_profile(run)
    if recorded_outcome(events.read(run)) is None:
        name = _request(run, steps, on_note)
    if name is None:
        fix = "profile a run while it trains, or set train.profile in its spec"
        raise RunError(f"run {run.id}", "it has ended and has no profile", fix)
    rank_profiles = profiles.read_profile(run, name)
    first_rank = rank_profiles[0]
    planned, reason = _planned_seconds(run, len(rank_profiles))
    parts = profiles.summarize(rank_profiles)
    present_ranks = {p.rank for p in rank_profiles}
    return {
        "run": run.id,
        "name": name,
        "path": str(run.profiles / name),
        "device": first_rank.device,
        "step": first_rank.step,
        "steps": first_rank.steps,
        "ranks": first_rank.ranks,
        "missing_ranks": [rank for rank in range(first_rank.ranks) if rank not in present_ranks],
        "parts": {part: {**seconds, "plan": planned.get(part)} for part, seconds in parts.items()},
        "unplanned": reason,
    }


def _request(run: RunDir, steps: int, on_note: OnNote) -> str:
    """Ask a run's workers for a profile, wait until it is written, and return its name; RunError if the run ends."""

    def new_events() -> list[dict[str, Any]]:
        return [e for e in events.read(run) if e["event"] == "profile"][known_count:]

    known_count = 0
    known_count = len(new_events())
    run.request_profile(steps)
    on_note("waiting for the profiled steps")
    try:
        for outcome in attempts.poll_outcome(run, partial(events.read, run), on_note=on_note):
            if profile_events := new_events():
                break
            if outcome:
                reason = f"it is {outcome.state}, and ended before its workers profiled a step"
                raise RunError(f"run {run.id}", reason, f"see `mhmoe status {attempts.run_argument(run)}`")
    finally:
        # A request that nobody waits for must not slow the run down later.
        run.clear_profile_request()
    [event, *_] = profile_events
    name, deadline = str(event["name"]), time.monotonic() + WRITE_SECONDS
    while len(profiles.read_profile(run, name)) < event["ranks"] and time.monotonic() < deadline:
        time.sleep(attempts.POLL_SECONDS)
    return name


def _planned_seconds(run: RunDir, ranks: int) -> tuple[dict[str, float], str | None]:
    """Return the seconds that the plan expects of each part, or why it expects none."""
    spec = run.spec()
    start_event = events.newest_event(events.read(run), "started")
    nodes = [worker["node"] for worker in start_event["workers"]] if start_event else []
    layout = build_layout([Node(name, 0, 0) for name in nodes], spec.cluster.ep)
    estimate = estimate_step(spec, layout)
    if estimate is None:
        return {}, "a spec describes the speed of GPUs, not that of CPUs"
    return estimate.part_seconds, None
