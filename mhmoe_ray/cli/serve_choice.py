"""The choice of the run, checkpoint, settings and API keys that `mhmoe serve deploy` serves."""

import os
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from mhmoe_ray.checkpoint.manifest import MANIFEST, read_manifest
from mhmoe_ray.cli.common import SPEC_SUFFIXES, pick_checkpoint, read_spec
from mhmoe_ray.errors import RunError, SpecError
from mhmoe_ray.runs.directory import RunDir, find_run, list_runs
from mhmoe_ray.spec import DeploySpec, KeySpec, ServeSpec, load_deploy_spec, parse_overrides
from mhmoe_ray.storage import Location, location

API_KEYS_VARIABLE = "MHMOE_API_KEYS"
CLUSTER_KEYS = (["cluster", "shared_filesystem"], ["cluster", "runtime_env"])
"""Keys of a spec outside the serve section that serving uses too."""


def resolve_target(
    target: str | None, checkpoint: str | None, storage: str, overrides: list[str]
) -> tuple[RunDir, Location, DeploySpec]:
    """Return the run, checkpoint and spec that the arguments of `mhmoe serve deploy` name.

    Args:
        target: a spec file, which stands for its newest run; the folder of a checkpoint; or a run's id, the start of
            one, or its path. None picks the newest run.
        checkpoint: name of a checkpoint of the run; None picks the newest.
        storage: folder that holds run directories.
        overrides: overrides of keys of the spec.

    Raises:
        SpecError: an override is not one that serving uses, or a spec is wrong.
        RunError, CheckpointError: there is no such run or checkpoint, or the checkpoint is damaged.
    """
    for keys, _ in parse_overrides(overrides):
        # An override that has no effect, such as one of train.lr, would mislead the user, so it is an error.
        if keys[0] != "serve" and keys[:2] not in CLUSTER_KEYS:
            raise SpecError(f"override {'.'.join(keys)}", "serving does not use it", "set keys of the serve section")
    spec_file: Location | None = None
    if target and target.endswith(SPEC_SUFFIXES):
        spec_file, run_spec = Path(target), read_spec(Path(target), [])
        runs = [r for r in list_runs(run_spec.storage) if r.name == run_spec.name]
        if not runs:
            raise RunError(
                f"spec {target}", f"{run_spec.storage} holds no run of it", f"start one: mhmoe submit {target}"
            )
        run = runs[-1]
    elif target and (location(target) / MANIFEST).exists():
        path = location(target).absolute()
        # This call raises an error for a damaged checkpoint, before a replica tries to load it. The manifest that it
        # returns is not needed.
        read_manifest(path, ("weights",), describe=None)
        run = RunDir.of_checkpoint(path)
        return run, path, load_deploy_spec(None if run.is_imported else run.spec_file, overrides)
    else:
        run = find_run(target, storage)
    # A spec file that the user names replaces the run's own spec, because its serve section may have changed since the
    # run started.
    spec = load_deploy_spec(spec_file or (None if run.is_imported else run.spec_file), overrides)
    return run, pick_checkpoint(run, checkpoint, verify_hashes=False)[0], spec


def option_overrides(replicas: str | None, engine: str | None) -> list[str]:
    """Return the overrides of the spec that the options --replicas and --engine stand for; None is no option.

    Args:
        replicas: a number, or a range like 1..4.
        engine: name of the engine.
    """
    overrides = []
    if replicas is not None:
        low, dots, high = replicas.partition("..")
        overrides.append(f"serve.replicas={{min: {low}, max: {high}}}" if dots else f"serve.replicas={replicas}")
    if engine is not None:
        overrides.append(f"serve.engine={engine}")
    return overrides


def with_environment_keys(spec: ServeSpec) -> ServeSpec:
    """Return a copy of the spec with the API keys of the environment variable MHMOE_API_KEYS added to its own.

    A key of the environment whose name is also in the spec gets the limits of that name.

    Raises:
        SpecError: two keys with the same name have different limits, or the environment variable is malformed.
    """
    keys_by_name: dict[str, KeySpec] = {}
    for key in spec.keys:
        # A client has two keys of one name while a new key replaces the old one. Requests with both keys count against
        # the same limits, so the limits must be equal.
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
        key_hash = sha256(secret.encode()).hexdigest()
        try:
            environment_keys.append(
                _with_hash(keys_by_name[name], key_hash)
                if name in keys_by_name
                else KeySpec(name=name, sha256=key_hash)
            )
        # Pydantic's error shows the name, which is the secret if somebody wrote KEY:NAME. The error is therefore not
        # chained.
        except ValidationError:
            reason = "a name has up to 40 letters, digits, dots, dashes and underscores, and one name here breaks this"
            raise SpecError(API_KEYS_VARIABLE, reason, "correct it, or unset it") from None
    return spec.model_copy(update={"keys": (*spec.keys, *environment_keys)})


def _with_hash(key: KeySpec, key_hash: str) -> KeySpec:
    """Return a copy of a client's key with another hash; name and limits stay the same."""
    return key.model_copy(update={"sha256": key_hash})
