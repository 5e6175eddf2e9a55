"""Search for settings of a run that fit a cluster on paper, the fastest by estimate first."""

from typing import Any

from mhmoe_ray.api.plan import estimate_figures
from mhmoe_ray.api.spec import require_spec
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.search import MEMORY_SHARE, Setting, on_paper, search_settings
from mhmoe_ray.spec import RunSpec

FACTORS = (2, 4, 8, 16, 32, 64)
"""Multiples of a cluster that are tried if a run does not fit on it."""


def search_plans(spec: RunSpec, nodes: int, gpus: int, count: int = 10) -> list[dict[str, Any]]:
    """Return the `count` fastest settings of a run by estimate, as `mhmoe plan --search --json` prints them.

    All values of the keys that change no loss, and of precisions, are compared at equal samples of a step. Settings
    that need over 90 % of a GPU's memory are left out.

    Args:
        spec: spec of the run.
        nodes: number of nodes.
        gpus: number of GPUs of each node, each with one worker.
        count: largest number of settings.

    Returns:
        A JSON object for each setting: `keys` with their values, and an `estimate` as in `mh.plan`.

    Raises:
        SpecError: no setting fits, or the GPUs cannot share the samples of a step.
    """
    require_spec(spec)
    return [setting_figures(setting) for setting in fitting_settings(spec, nodes, gpus, count)]


def fitting_settings(spec: RunSpec, nodes: int, gpus: int, count: int) -> list[Setting]:
    """Return the settings of `search_plans`; if none fits, the SpecError names a number of GPUs that suffices."""
    settings = search_settings(*on_paper(spec, nodes, gpus), count)
    if settings:
        return settings
    factor = next((f for f in FACTORS if _fits(spec, f * nodes, gpus)), None)
    remedy = f"{factor * nodes * gpus:,} GPUs, on which it fits" if factor else "GPUs with more memory"
    reason = f"no setting fits in {MEMORY_SHARE:.0%} of the memory of {nodes * gpus:,} GPUs"
    raise SpecError(f"spec {spec.name}", reason, f"plan for {remedy}, or make the model smaller")


def _fits(spec: RunSpec, nodes: int, gpus: int) -> bool:
    try:
        return bool(search_settings(*on_paper(spec, nodes, gpus), 1))
    # So many GPUs cannot share the samples of a step.
    except SpecError:
        return False


def setting_figures(setting: Setting) -> dict[str, Any]:
    """Return a setting as `mhmoe plan --search --json` prints it."""
    return {
        "keys": setting.keys,
        "estimate": estimate_figures(setting.spec, setting.estimate.layout, setting.estimate),
    }
