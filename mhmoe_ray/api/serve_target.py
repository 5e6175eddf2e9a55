"""Find what a server needs: the checkpoint of a run, the run's settings for serving and the API keys."""

import os
from collections.abc import Sequence
from hashlib import sha256
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from mhmoe_ray.api.checkpoints import CheckpointName, has_file, path_text, pick_checkpoint, refuse_checkpoint
from mhmoe_ray.api.defaults import SPEC_SUFFIXES, OnNote, ignore_note
from mhmoe_ray.api.spec import load_spec
from mhmoe_ray.api.trust import ignored_keys
from mhmoe_ray.checkpoint.find import split_step
from mhmoe_ray.checkpoint.manifest import MANIFEST, read_manifest
from mhmoe_ray.errors import RunError, SpecError
from mhmoe_ray.runs.directory import RunDir, find_run, list_runs
from mhmoe_ray.spec import (
    DeploySpec,
    KeySpec,
    RunSpec,
    ServeSpec,
    apply_overrides,
    load_deploy_spec,
    parse_overrides,
    validate_section,
)
from mhmoe_ray.spec.serve import is_valid_key
from mhmoe_ray.storage import Location, default_storage, location

API_KEYS_VARIABLE = "MHMOE_API_KEYS"
CLUSTER_KEYS = (["cluster", "shared_filesystem"], ["cluster", "runtime_env"])
"""Keys of a spec outside of its serve section that serving uses, too."""


def resolve_target(
    target: str | PathLike[str] | RunSpec | None,
    checkpoint: CheckpointName | None,
    storage: Location | str | None,
    overrides: Sequence[str] = (),
    on_note: OnNote = ignore_note,
    trust_run: bool = False,
) -> tuple[RunDir, Location, DeploySpec]:
    """Return the run and the checkpoint to serve, and the spec with which they are served.

    Arguments are those of `serve`; `overrides` are `key.path=value` strings. A wrong spec, or an override that serving
    does not use, is a SpecError, a missing run a RunError, a missing or damaged checkpoint a CheckpointError, and a
    folder that cannot be read a StorageError.
    """
    for keys, _ in parse_overrides(overrides):
        # An override that has no effect, such as one of train.lr, would mislead the user, so it is an error.
        if keys[0] != "serve" and keys[:2] not in CLUSTER_KEYS:
            raise SpecError(f"override {'.'.join(keys)}", "serving does not use it", "set keys of the serve section")
    if isinstance(target, RunSpec):
        run = _newest_run(target, storage, f"spec {target.name}", "start one with `mhmoe_ray.submit`")
        tree = target.model_dump(mode="json", include=set(DeploySpec.model_fields))
        spec = validate_section(DeploySpec, apply_overrides(tree, overrides), f"spec {target.name}")
        return run, pick_checkpoint(run, checkpoint, verify_hashes=False, on_note=on_note)[0], spec
    name, spec_file = None if target is None else path_text(target), None
    if checkpoint is None:
        name, checkpoint = split_step(name)
    if name and name.endswith(SPEC_SUFFIXES):
        spec_file = Path(name)
        run = _newest_run(load_spec(spec_file), storage, f"spec {name}", f"start one: mhmoe submit {name}")
    elif name and has_file(location(name), MANIFEST):
        refuse_checkpoint(checkpoint, name)
        path = location(name).absolute()
        # This call raises an error for a damaged checkpoint, before a replica tries to load it.
        read_manifest(path, ("weights",), describe=None)
        run = RunDir.of_checkpoint(path)
        return run, path, _spec_of_run(run, overrides, on_note, trust_run)
    else:
        run = find_run(name, storage or default_storage())
    # The serve section of a spec file that the user names may have changed since the run started.
    spec = load_deploy_spec(spec_file, overrides) if spec_file else _spec_of_run(run, overrides, on_note, trust_run)
    return run, pick_checkpoint(run, checkpoint, verify_hashes=False, on_note=on_note)[0], spec


def _spec_of_run(run: RunDir, overrides: Sequence[str], on_note: OnNote, trust_run: bool) -> DeploySpec:
    """Return the sections of a run's own spec that serving uses, without settings that need trust and have none."""
    return load_deploy_spec(
        None if run.is_imported else run.spec_file,
        overrides,
        lambda spec: ignored_keys(run, spec, on_note, trust_run),
    )


def _newest_run(spec: RunSpec, storage: Location | str | None, subject: str, fix: str) -> RunDir:
    """Return the newest run with the spec's name, or raise a RunError with this subject and fix."""
    folder = storage or spec.storage
    runs = [run for run in list_runs(folder) if run.name == spec.name]
    if not runs:
        raise RunError(subject, f"{folder} holds no run of it", fix)
    return runs[-1]


def with_environment_keys(spec: ServeSpec) -> ServeSpec:
    """Return a copy of the spec with the API keys of the environment variable MHMOE_API_KEYS added to its own.

    A key with the name of a key of the spec gets its limits. A SpecError says that keys of one name have different
    limits, or that the variable is malformed or has a key that not every client can send.
    """
    keys_by_name: dict[str, KeySpec] = {}
    for key in spec.keys:
        # A client has two keys of one name while a new key replaces the old one; requests of both count together.
        if _with_hash(keys_by_name.setdefault(key.name, key), key.sha256) != key:
            reason = "two keys of this name have different limits, and limits are counted by name"
            raise SpecError(
                f"serve.keys, {key.name}", reason, "give both keys the same limits, or give one another name"
            )
    environment_keys = []
    for pair in filter(None, map(str.strip, os.environ.get(API_KEYS_VARIABLE, "").split(","))):
        name, _, secret = map(str.strip, pair.partition(":"))
        if not (name and secret):
            raise SpecError(API_KEYS_VARIABLE, "it is not NAME:KEY,NAME:KEY", "correct it, or unset it")
        # The error does not show the name, because the name is the secret if somebody wrote KEY:NAME.
        if not is_valid_key(secret):
            reason = "a key has a character that is not printable ASCII, and not every client can send it"
            raise SpecError(API_KEYS_VARIABLE, reason, "choose a key of ASCII letters and digits")
        key_hash = sha256(secret.encode()).hexdigest()
        try:
            environment_keys.append(
                _with_hash(keys_by_name[name], key_hash)
                if name in keys_by_name
                else KeySpec(name=name, sha256=key_hash)
            )
        # Pydantic's error shows the name, which is the secret if somebody wrote KEY:NAME, so it is not chained.
        except ValidationError:
            reason = "a name has up to 40 letters, digits, dots, dashes and underscores, and one name here breaks this"
            raise SpecError(API_KEYS_VARIABLE, reason, "correct it, or unset it") from None
    return spec.model_copy(update={"keys": (*spec.keys, *environment_keys)})


def _with_hash(key: KeySpec, key_hash: str) -> KeySpec:
    return key.model_copy(update={"sha256": key_hash})
