"""The choice of what `mhmoe serve deploy` serves: the run, its checkpoint, its settings and API keys."""

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

KEYS = "MHMOE_API_KEYS"
OF_CLUSTER = (["cluster", "shared_filesystem"], ["cluster", "runtime_env"])
"""Keys of a spec that serving uses beside the serve section."""


def chosen(
    target: str | None, checkpoint: str | None, storage: str, overrides: list[str]
) -> tuple[RunDir, Location, DeploySpec]:
    """Return the run, its checkpoint, and the spec by which it is served.

    Args:
        target: a spec file, a checkpoint directory, or the name of a run; None picks the newest run.
        checkpoint: name of a checkpoint of the run; None picks the newest.
        storage: folder that holds run directories.
        overrides: overrides of keys that serving uses.

    Raises:
        SpecError: an override is not one that serving uses, or a spec is wrong.
        RunError, CheckpointError: there is no such run or checkpoint.
    """
    for keys, _ in parse_overrides(overrides):
        if keys[0] != "serve" and keys[:2] not in OF_CLUSTER:
            raise SpecError(f"override {'.'.join(keys)}", "serving does not use it", "set keys of the serve section")
    spec_file: Location | None = None
    if target and target.endswith(SPEC_SUFFIXES):
        spec_file, whole = Path(target), read_spec(Path(target), [])
        runs = [r for r in list_runs(whole.storage) if r.name == whole.name]
        if not runs:
            raise RunError(f"spec {target}", f"{whole.storage} holds no run of it", f"start one: mhmoe submit {target}")
        run = runs[-1]
    elif target and (location(target) / MANIFEST).exists():
        path = location(target).absolute()
        read_manifest(path, ("weights",), describe=None)
        run = RunDir.of_checkpoint(path)
        return run, path, load_deploy_spec(None if run.is_imported else run.spec_file, overrides)
    else:
        run = find_run(target, storage)
    spec = load_deploy_spec(spec_file or (None if run.is_imported else run.spec_file), overrides)
    return run, pick_checkpoint(run, checkpoint, hashed=False)[0], spec


def sizes_set(replicas: str | None, engine: str | None) -> list[str]:
    """Return the options --replicas and --engine as overrides of the spec."""
    found = []
    if replicas is not None:
        low, dots, high = replicas.partition("..")
        found.append(f"serve.replicas={{min: {low}, max: {high}}}" if dots else f"serve.replicas={replicas}")
    if engine is not None:
        found.append(f"serve.engine={engine}")
    return found


def with_keys(spec: ServeSpec) -> ServeSpec:
    """Return the spec with the API keys that the environment names added to its own.

    Limits belong to a name: an additional key with a name that the spec has, as while keys are being changed, gets the
    same limits.

    Raises:
        SpecError: two keys with the same name have different limits, or the environment variable is malformed.
    """
    known: dict[str, KeySpec] = {}
    for key in spec.keys:
        if _limited_as(known.setdefault(key.name, key), key.sha256) != key:
            why = "two keys of this name have different limits, and limits are counted by name"
            raise SpecError(f"serve.keys, {key.name}", why, "give both the same, or one another name")
    added = []
    for pair in filter(None, map(str.strip, os.environ.get(KEYS, "").split(","))):
        name, _, secret = map(str.strip, pair.partition(":"))
        if not (name and secret):
            raise SpecError(KEYS, "it is not NAME:KEY,NAME:KEY", "correct it, or unset it")
        hashed = sha256(secret.encode()).hexdigest()
        try:
            added.append(_limited_as(known[name], hashed) if name in known else KeySpec(name=name, sha256=hashed))
        except ValidationError:  # which shows the name; where the two are exchanged, that is the key
            why = "a name has up to 40 letters, digits, dots, dashes and underscores, and one is not so"
            raise SpecError(KEYS, why, "correct it, or unset it") from None
    return spec.model_copy(update={"keys": (*spec.keys, *added)})


def _limited_as(key: KeySpec, hashed: str) -> KeySpec:
    """Return a key with another hash for the same client, with the same limits."""
    return key.model_copy(update={"sha256": hashed})
