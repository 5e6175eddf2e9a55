"""Settings of a run that somebody else may have written: they run code or open a server, so they need the user's word.

The record of what this user has submitted is in `cluster/submissions.py`.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from mhmoe_ray.api.defaults import OnNote
from mhmoe_ray.cluster.submissions import GUARDED_KEYS, unrecorded_settings
from mhmoe_ray.errors import SpecError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import DeploySpec, RunSpec


def ignored_keys(
    run: RunDir,
    spec: RunSpec | DeploySpec,
    on_note: OnNote,
    trust_run: bool = False,
    used_keys: Collection[str] = GUARDED_KEYS,
) -> Collection[str]:
    """Return the keys of a run's spec that a command must ignore, and report them with their values.

    `used_keys` are those of `GUARDED_KEYS` that the command would use; with `trust_run`, no key is ignored.
    """
    settings = {} if trust_run else unrecorded_settings(spec)
    ignored_settings = {key: value for key, value in settings.items() if key in used_keys}
    if ignored_settings:
        on_note(
            f"warning: you did not submit run {run.id}, so these settings of it are ignored: "
            f"{_text(ignored_settings)}; --trust-run (trust_run=True) uses them"
        )
    return ignored_settings.keys()


def require_submitted_settings(run: RunDir, spec: RunSpec) -> None:
    """Raise a SpecError if a run's spec has guarded settings that this user never submitted."""
    if settings := unrecorded_settings(spec):
        reason = f"you did not submit it, and its spec sets {_text(settings)}"
        raise SpecError(f"run {run.id}", reason, "if you trust it: `mhmoe resume --trust-run` or trust_run=True")


def _text(settings: Mapping[str, Any]) -> str:
    # JSON escapes characters that would control a terminal.
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
