"""Record of what this user has submitted: guarded settings of specs, and addresses of clusters.

Anybody may have written a run directory. Its settings that run code or open a server, and the clusters to which it
refers, are used as they are only if this record in the state folder has them.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any, Literal

from mhmoe_ray.cluster.tokens import state_folder, state_lock, write_state
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.parsing import ParseError, parse_object
from mhmoe_ray.spec import DeploySpec, RunSpec
from mhmoe_ray.storage import read_file

FILE = "submissions.json"
ENVIRONMENT_KEY = "cluster.runtime_env"
GUARDED_KEYS = (ENVIRONMENT_KEY, "serve.host", "serve.keys", "serve.cors_origins", "serve.vllm")
"""Keys of a spec that run code on a cluster, open a server to other machines, or give clients or pages access to it."""


def record_settings(*specs: RunSpec) -> None:
    """Record the guarded settings of specs that this user submits."""
    _add("settings", {_digest(settings) for spec in specs if (settings := _guarded_settings(spec))})


def unrecorded_settings(spec: RunSpec | DeploySpec) -> dict[str, Any]:
    """Return the guarded settings of a spec by key, without defaults; none if this user has submitted them together."""
    settings = _guarded_settings(spec)
    return {} if _digest(settings) in _read("settings") else settings


def record_address(address: str) -> None:
    """Record the normalised address of a cluster that this user named."""
    _add("addresses", {address})


def has_address(address: str) -> bool:
    """Return whether this user has named the cluster with this normalised address in an earlier command."""
    return address in _read("addresses")


def _guarded_settings(spec: RunSpec | DeploySpec) -> dict[str, Any]:
    sections = DeploySpec(cluster=spec.cluster, serve=spec.serve)
    values, defaults = (dict(_guarded_items(s.model_dump(mode="json"))) for s in (sections, DeploySpec()))
    return {key: value for key, value in values.items() if value != defaults[key]}


def _guarded_items(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in GUARDED_KEYS:
        section, _, name = key.partition(".")
        yield key, tree[section][name]


def _digest(settings: Mapping[str, Any]) -> str:
    # The record holds hashes, because environment variables of a runtime environment may be secrets.
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


Part = Literal["settings", "addresses"]


def _read(part: Part) -> list[str]:
    path = state_folder() / FILE
    try:
        return [str(item) for item in parse_object(read_file(path)).get(part, [])] if path.exists() else []
    except (ParseError, TypeError) as e:
        raise ClusterError(
            f"file {path}", "it is damaged", "remove it; later submissions record themselves again"
        ) from e


def _add(part: Part, items: set[str]) -> None:
    if items <= set(_read(part)):
        return
    try:
        with state_lock():
            parts = {"settings": _read("settings"), "addresses": _read("addresses")}
            parts[part] = sorted({*parts[part], *items})
            write_state(FILE, parts)
    except ClusterError as e:
        # The command itself needs no record. Later commands say what they do not use without it.
        print(
            f"warning: this submission is not recorded, so later commands will not trust its run: {e}", file=sys.stderr
        )
