"""Find the adapters that a server answers with, beside the model that they adapt."""

import re
from collections.abc import Mapping
from os import PathLike
from pkgutil import resolve_name

from mhmoe_ray.api.checkpoints import has_file, path_text, pick_checkpoint
from mhmoe_ray.checkpoint.find import split_step
from mhmoe_ray.checkpoint.manifest import MANIFEST, read_manifest, stored_manifest
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir, find_run
from mhmoe_ray.spec.serve import ADAPTER_NAME, ENGINES, ServeSpec
from mhmoe_ray.storage import Location, location


def find_adapters(
    targets: Mapping[str, str | PathLike[str]], base: Location, base_run: RunDir, spec: ServeSpec
) -> dict[str, Location]:
    """Return the checkpoint of each adapter by name: that of RUN or RUN@STEP, or a checkpoint's folder.

    Runs are looked for beside that of the checkpoint `base`, and none of the names may be its id. A run that is missing
    is a RunError, and a damaged checkpoint a CheckpointError. A wrong name, a checkpoint without an adapter, and one
    with an adapter of other weights than those of `base`, or that the engine cannot compute, are a ServeError.
    """
    if base_run.id in targets:
        raise ServeError(f"adapter {base_run.id}", "the served model itself has this name", "give it another name")
    for name in targets:
        if not re.fullmatch(ADAPTER_NAME, name):
            reason = "a name has at most 40 letters, digits, dots, dashes and underscores"
            raise ServeError(f"adapter {name!r}", reason, "give it another name")
    return {
        name: _find_adapter(name, path_text(target), base, base_run.path.parent, spec)
        for name, target in targets.items()
    }


def _find_adapter(name: str, target: str, base: Location, storage: Location, spec: ServeSpec) -> Location:
    if has_file(location(target), MANIFEST):
        checkpoint = location(target).absolute()
        manifest = read_manifest(checkpoint, ("weights",), describe=None)
    else:
        run_name, step = split_step(target)
        checkpoint, manifest = pick_checkpoint(find_run(run_name, storage), step, verify_hashes=False)
    # This import loads torch, which few commands need.
    from mhmoe_ray.checkpoint.load import equal_weights

    subject, base_manifest = f"adapter {name}", stored_manifest(base)
    if manifest.adapter is None:
        reason = f"{target} has all weights of a model, and no adapter of another"
        raise ServeError(subject, reason, "name a run with train.adapter, after its step 0")
    trained_base = checkpoint.with_name(manifest.adapter.base)
    # The same weights have other hashes if ranks divided them in another way.
    if base_manifest.adapter or not (
        base_manifest.weights_sha256 == manifest.adapter.base_sha256 or equal_weights(base, trained_base)
    ):
        reason = f"it was trained on other weights than those of {base}"
        raise ServeError(subject, reason, f"serve {trained_base}, or another adapter")
    if (check := ENGINES[spec.engine].check_adapter) is not None:
        resolve_name(check)(name, manifest, spec)
    return checkpoint
