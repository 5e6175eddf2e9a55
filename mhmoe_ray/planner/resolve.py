"""Resolve a spec with shorthands into a complete spec, and find presets by name.

In addition to the sections of a spec, the file may have shorthands:

preset: mhmoe                  name of a model with its recipe; the file's sections override it key by key
size: tiny                     size of the model, for a preset of a family
match: {to: smoe, by: both}    solve for the expert width and the number of experts
reference: smoe                model to compare with in `mhmoe plan`, instead of that of the preset or match
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.adapt import BATCH_KEYS
from mhmoe_ray.planner.match import SEARCH_LIMIT, SOLVED_KEYS, MatchSpec, solve_match
from mhmoe_ray.planner.papers import paper_presets
from mhmoe_ray.planner.presets import FAMILIES, SIZES, Preset, SizeName, Tree
from mhmoe_ray.planner.sizes import dense_width
from mhmoe_ray.spec import EncoderSpec, ModelSpec, ReferenceSpec, RunSpec, validate_section
from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.hints import MIN_SIMILARITY

DEFAULT_SIZE: SizeName = "tiny"


def find_preset(name: str, size: SizeName | None = None) -> Preset:
    """Return the preset of a name; an unknown name, or a size for a paper's model, is a SpecError."""
    if name in FAMILIES:
        return FAMILIES[name].preset_at(size or DEFAULT_SIZE)
    if name not in paper_presets():
        similar_names = difflib.get_close_matches(name, [*FAMILIES, *paper_presets()], n=1, cutoff=MIN_SIMILARITY)
        suggestion = f"did you mean {similar_names[0]!r}? " if similar_names else ""
        raise SpecError(f"preset {name}", "there is no such preset", f"{suggestion}`mhmoe presets` lists them all")
    if size is not None:
        reason = "it is a published model of its own size, so `size` would be ignored"
        raise SpecError(f"preset {name}", reason, f"leave out size, or take a family: {', '.join(FAMILIES)}")
    return paper_presets()[name]


def all_presets() -> list[tuple[str, SizeName | None, Preset]]:
    """Return all presets as (name, size, preset). The size of a paper's model is None."""
    families = [(name, size, family.preset_at(size)) for size in SIZES for name, family in FAMILIES.items()]
    return [*families, *((name, None, preset) for name, preset in paper_presets().items())]


def preset_origin(name: str, size: SizeName | None) -> str:
    """Return the spec's key `origin`: the preset's name, followed by a blank and its size if it belongs to a family."""
    return f"{name} {size or DEFAULT_SIZE}" if name in FAMILIES else name


def preset_description(origin: str) -> str:
    """Return the description of the preset that a spec's key `origin` names, which may be one of another version."""
    name, _, size = origin.partition(" ")
    descriptions = (preset.description for n, s, preset in all_presets() if n == name and (not size or s == size))
    # The preset may be missing here, because another version of this package, with other presets, may have written the
    # spec.
    return next(descriptions, "a preset of another version")


class Shorthands(Section):
    """Top-level keys of a spec file that are replaced by other keys in a complete spec."""

    preset: str | None = None
    """Name of a preset, which is a complete model with its training recipe. Keys of the file override the preset's keys
    one by one."""
    size: SizeName | None = None
    """Size of the model, for a preset of a family; by default tiny."""
    match: MatchSpec | None = None
    """Reference model that this model shall equal in compute, parameters or both. The match solves for the expert width
    and the number of experts."""


def resolve_spec(tree: Tree, label: str, fill_tree: Callable[[Tree, str], Tree] | None = None) -> RunSpec:
    """Replace the shorthands of a spec file, such as `preset`, and return the checked, complete spec.

    `tree` is the file's content after overrides, which may set shorthands too; it may be changed. `label` names the
    spec in error messages. `fill_tree(tree, label)` returns the tree with more defaults, such as those of the run that
    this one starts from. An invalid spec, a sweep, an unknown preset, a key that would be ignored and a match without a
    solution are SpecErrors.
    """
    if "sizes" in tree and "model" not in tree:
        raise SpecError(label, "its key `sizes` makes it a sweep, not the spec of one run", "give it to `mhmoe sweep`")
    if fill_tree is not None:
        tree = fill_tree(tree, label)
    own_train = tree.get("train") or {}
    has_own_batches = not isinstance(own_train, dict) or any(key in own_train for key in BATCH_KEYS)
    has_preset = "preset" in tree
    tree = _resolve_shorthands(tree, label)
    spec = validate_section(RunSpec, tree, label, extra_keys=list(Shorthands.model_fields))
    if has_preset and not has_own_batches and not spec.data.parts:
        # Presets have micro-batches of few sequences, with which a GPU mostly waits for launches of kernels.
        spec.train.model_fields_set.difference_update(BATCH_KEYS)
    if not spec.cluster.gpus_per_worker:
        return spec
    # The search imports most of the planner, which a spec of a run on CPUs does not need.
    from mhmoe_ray.planner.search import choose_settings

    return choose_settings(spec)[0]


def preset_models(preset: Preset) -> tuple[ModelSpec, ModelSpec | None]:
    """Return a preset's model and its reference model, which is None if the preset names none."""
    trunk, label = dict(preset.trunk), "preset"
    model = _build_model(trunk, _preset_moe(preset, trunk, label), label)
    return model, _reference_model(preset.reference, trunk, {}, label) if preset.reference else None


def _resolve_shorthands(tree: Tree, label: str) -> Tree:
    """Replace the shorthands of a spec file, which may itself change."""
    shorthand_values = {key: tree.pop(key) for key in Shorthands.model_fields if key in tree}
    shorthands = validate_section(Shorthands, shorthand_values, label)
    own_model = tree.get("model", {})
    _refuse_value(own_model, "model", label)
    own_moe = own_model.get("moe", {})
    if own_moe is not None:
        _refuse_value(own_moe, "model.moe", label, ", or null for a dense model")
    _refuse_unused_keys(shorthands, tree, own_moe or {}, label)
    preset = None
    if shorthands.preset:
        preset = find_preset(shorthands.preset, shorthands.size)
        preset_tree = {"model": dict(preset.trunk), "train": dict(preset.train), "data": {"seq_len": preset.seq_len}}
        tree = merge_trees(preset_tree, tree)
        tree["origin"] = preset_origin(shorthands.preset, shorthands.size)
    # Without a model there is nothing to resolve. The check of the complete spec reports the missing section.
    if "model" not in tree:
        return tree
    trunk = {key: value for key, value in tree["model"].items() if key != "moe"}
    moe = _moe_section(own_moe, preset, shorthands.match, trunk, _ep_size(tree), label)
    tree["model"] = {**(trunk if "d_ff" in own_model else _without_unused_width(trunk, moe)), "moe": moe}
    # The model is checked before the reference is built, because an error about the reference would hide a mistake in
    # the model itself.
    validate_section(ModelSpec, tree["model"], label, prefix="model.")
    reference = preset.reference if preset and "reference" not in tree else tree.get("reference")
    if shorthands.match:
        reference = shorthands.match.to
    if reference is not None:
        tree["reference"] = _reference_section(reference, trunk, moe or {}, label)
    return tree


def _moe_section(
    own_keys: Tree | None, preset: Preset | None, match: MatchSpec | None, trunk: Tree, ep: int, label: str
) -> Tree | None:
    """Return the `moe` section: the preset's keys, overridden by `own_keys`, and the keys that a match solves for.

    It is None for a dense model. If `own_keys` is None, the user asked for one.
    """
    base = preset.moe(trunk) if preset and preset.moe else {}
    moe = {**base, **own_keys} if own_keys is not None else {}
    if match is None and preset and moe:
        match = preset.match
    if match is None:
        return moe or None
    if not moe:
        raise SpecError(label, "'match' is for experts, but this model has none", "remove match, or add model.moe")
    return _solve_section(moe, own_keys or {}, match, trunk, ep, label)


def _ep_size(tree: Tree) -> int:
    # A malformed value is no error here, because the check of the complete spec reports it.
    cluster = tree.get("cluster")
    ep = cluster.get("ep", 1) if isinstance(cluster, dict) else 1
    return ep if isinstance(ep, int) and ep > 0 else 1


def _solve_section(moe: Tree, own_keys: Tree, match: MatchSpec, trunk: Tree, ep: int, label: str) -> Tree:
    # Values that are still to be solved get large placeholders, because the check of the model requires at least
    # `top_k` experts.
    placeholders = dict.fromkeys(SOLVED_KEYS[match.by] - own_keys.keys(), SEARCH_LIMIT)
    model = _build_model(trunk, {**moe, **placeholders}, label)
    d_expert, experts = solve_match(model, _reference_model(match.to, trunk, moe, label), match, own_keys.keys(), ep)
    return {**moe, "d_expert": d_expert, "experts": experts}


def _reference_section(value: Any, trunk: Tree, moe: Tree, label: str) -> ReferenceSpec:
    """Return the section `reference`, which a file may also give as the name of a preset."""
    if isinstance(value, str):
        return ReferenceSpec(name=value, moe=_reference_model(value, trunk, moe, label).moe)
    _refuse_value(value, "reference", label)
    reference = validate_section(ReferenceSpec, value, label, prefix="reference.")
    _build_model(
        trunk, None if reference.moe is None else reference.moe.model_dump(), f"{label}, reference {reference.name}"
    )
    return reference


def _reference_model(name: str, trunk: Tree, moe: Tree, label: str) -> ModelSpec:
    """Return the reference model: the experts of preset `name` on the trunk of the model to compare.

    Its layers with experts are those that the keys `every` and `dense_first` of `moe` choose.
    """
    moe_section = _preset_moe(find_preset(name), trunk, label)
    if moe_section is not None:
        moe_section.update({key: moe[key] for key in ("every", "dense_first") if key in moe})
    return _build_model(trunk, moe_section, f"{label}, reference {name}")


def _preset_moe(preset: Preset, trunk: Tree, label: str) -> Tree | None:
    if preset.moe is None:
        return None
    moe = preset.moe(trunk)
    return _solve_section(moe, {}, preset.match, trunk, 1, label) if preset.match else moe


def _build_model(trunk: Tree, moe: Tree | None, label: str) -> ModelSpec:
    """Return the checked model of a trunk and a `moe` section.

    Dense layers get the default width if the trunk sets none. `vision.adaptive` is left out of a model without experts.
    """
    used_trunk = _without_unused_width(trunk, moe)
    if trunk.get("d_ff") is None and used_trunk is trunk and "d_model" in trunk:
        used_trunk = {**trunk, "d_ff": dense_width(trunk)}
    if moe is None and isinstance(trunk.get("vision"), dict):
        used_trunk = {**used_trunk, "vision": {**trunk["vision"], "adaptive": None}}
    return validate_section(ModelSpec, {**used_trunk, "moe": moe}, label, prefix="model.")


def _without_unused_width(trunk: Tree, moe: Tree | None) -> Tree:
    encoder = trunk.get("encoder")
    default_position = EncoderSpec.model_fields["experts"].default
    has_experts_beside = isinstance(encoder, dict) and encoder.get("experts", default_position) == "beside"
    if moe is None or moe.get("every") != 1 or moe.get("dense_first") or has_experts_beside:
        return trunk
    # The unused width may come from a preset. So it is removed and not reported as a mistake of the user.
    return {**trunk, "d_ff": None}


def _refuse_unused_keys(shorthands: Shorthands, tree: Tree, own_moe: Tree, label: str) -> None:
    if shorthands.size and not shorthands.preset:
        raise SpecError(label, "'size' is given without preset, so it would be ignored", "add preset, or remove size")
    if shorthands.match is None:
        return
    if tree.get("reference") is not None:
        reason = f"a reference is given, but a matched model is compared with its match ({shorthands.match.to})"
        raise SpecError(label, reason, "remove reference or match")
    conflicting_keys = sorted(SOLVED_KEYS[shorthands.match.by] & own_moe.keys())
    if conflicting_keys:
        keys = " and ".join(f"model.moe.{key}" for key in conflicting_keys)
        raise SpecError(label, f"{keys} would be ignored, because match solves it", "remove it, or remove match")


def _refuse_value(value: Any, name: str, label: str, alternative: str = "") -> None:
    """Raise a SpecError if the value of the key `name` is not a section."""
    if not isinstance(value, dict):
        raise SpecError(label, f"{name!r} is a value, not a section", f"write its keys below it{alternative}")


def merge_trees(base: Any, override: Any) -> Any:
    """Merge `override` into `base` key by key at all levels; if either is not a mapping, the result is `override`."""
    if not isinstance(base, Mapping) or not isinstance(override, Mapping):
        return override
    return {**base, **{key: merge_trees(base.get(key), value) for key, value in override.items()}}
