"""Resolve a spec file as users write it into a complete spec, and find presets by name.

Beside the sections of a spec, the file may hold shorthands:

preset: mhmoe                  a model with its recipe, by name; the file's sections override it key by key
size: tiny                     the size, for a preset of a family
match: {to: smoe, by: both}    expert width and number of experts are solved, not given
reference: smoe                the model that `plan` compares with, if not that of the preset or match
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.match import MOST, SOLVED, MatchSpec, solve
from mhmoe_ray.planner.papers import models
from mhmoe_ray.planner.presets import FAMILIES, SIZES, Preset, SizeName, Tree
from mhmoe_ray.planner.sizes import dense_width
from mhmoe_ray.spec import ModelSpec, ReferenceSpec, RunSpec, checked, read_tree
from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.hints import NEAR

DEFAULT_SIZE: SizeName = "tiny"


def find_preset(name: str, size: SizeName | None = None) -> Preset:
    """Return the preset of this name.

    Args:
        name: name of a family, or of one of the papers' models.
        size: size of a family's model; tiny if not given.

    Raises:
        SpecError: there is no such preset, or a size is given for a model with a size of its own.
    """
    if name in FAMILIES:
        return FAMILIES[name].at(size or DEFAULT_SIZE)
    if name not in models():
        near = difflib.get_close_matches(name, [*FAMILIES, *models()], n=1, cutoff=NEAR)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SpecError(f"preset {name}", "there is none of this name", f"{hint}`mhmoe presets` lists them all")
    if size is not None:
        why = "it is a published model of its own size, so `size` would be ignored"
        raise SpecError(f"preset {name}", why, f"leave out size, or take a family: {', '.join(FAMILIES)}")
    return models()[name]


def every_preset() -> list[tuple[str, SizeName | None, Preset]]:
    """Return all presets as (name, size, preset); the size of a paper's model is None."""
    families = [(name, size, family.at(size)) for size in SIZES for name, family in FAMILIES.items()]
    return [*families, *((name, None, preset) for name, preset in models().items())]


def origin(name: str, size: SizeName | None) -> str:
    """Return the text by which a spec records the preset that it came from."""
    return f"{name} {size or DEFAULT_SIZE}" if name in FAMILIES else name


def about(origin: str) -> str:
    """Return the description of the preset that a spec records as its origin."""
    name, _, size = origin.partition(" ")
    found = (preset.about for n, s, preset in every_preset() if n == name and (not size or s == size))
    return next(found, "a preset of another version")


class Shorthands(Section):
    preset: str | None = None
    size: SizeName | None = None
    match: MatchSpec | None = None


def resolve_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Return the complete spec of a file; a complete spec resolves to itself.

    Args:
        path: path of a YAML file.
        overrides: `key.path=value` strings, which may set shorthands too.

    Raises:
        SpecError: as in `load_resolved_spec`; or the preset does not exist, or a match has no solution.
    """
    what = f"spec {path}"
    tree = read_tree(path, overrides)
    if "sizes" in tree and "model" not in tree:
        raise SpecError(what, "it is a sweep, not the spec of one run", "give it to `mhmoe sweep`")
    tree = _worked_out(tree, what)
    return checked(RunSpec, tree, what, also=list(Shorthands.model_fields))


def models_of(preset: Preset) -> tuple[ModelSpec, ModelSpec | None]:
    """Return a preset's model, and its reference on the same trunk (None if it has none)."""
    trunk, what = dict(preset.trunk), "preset"
    model = _model(trunk, _experts_on(preset, trunk, what), what)
    return model, _reference_model(preset.reference, trunk, {}, what) if preset.reference else None


def _worked_out(tree: Tree, what: str) -> Tree:
    given = {key: tree.pop(key) for key in Shorthands.model_fields if key in tree}
    short = checked(Shorthands, given, what)
    own_model = tree.get("model", {})
    _refuse_what_is_no_section(own_model, "model", what)
    own_moe = own_model.get("moe", {})
    if own_moe is not None:
        _refuse_what_is_no_section(own_moe, "model.moe", what, ", or null for a dense model")
    _refuse_what_would_be_ignored(short, tree, own_moe or {}, what)
    preset = None
    if short.preset:
        preset = find_preset(short.preset, short.size)
        fragment = {"model": dict(preset.trunk), "train": dict(preset.train), "data": {"seq_len": preset.seq_len}}
        tree = _merged(fragment, tree)
        tree["origin"] = origin(short.preset, short.size)
    if "model" not in tree:
        return tree  # the check of the whole says so
    trunk = {key: value for key, value in tree["model"].items() if key != "moe"}
    moe = _moe(own_moe, preset, short.match, trunk, _ep(tree), what)
    tree["model"] = {**(trunk if "d_ff" in own_model else _without_unused_width(trunk, moe)), "moe": moe}
    checked(ModelSpec, tree["model"], what, below="model.")
    reference = preset.reference if preset and "reference" not in tree else tree.get("reference")
    if short.match:
        reference = short.match.to
    if reference is not None:
        tree["reference"] = _reference(reference, trunk, moe or {}, what)
    return tree


def _moe(
    own: Tree | None, preset: Preset | None, match: MatchSpec | None, trunk: Tree, ep: int, what: str
) -> Tree | None:
    """Return the `moe` section: the preset's, overridden by the user's own keys, with the keys that a match solves;
    None if the model is dense."""
    base = preset.moe(trunk) if preset and preset.moe else {}
    moe = {**base, **own} if own is not None else {}
    if match is None and preset and moe:
        match = preset.match
    if match is None:
        return moe or None
    if not moe:
        raise SpecError(what, "'match' is for experts, and this model has none", "remove match, or add model.moe")
    return _solved(moe, own or {}, match, trunk, ep, what)


def _ep(tree: Tree) -> int:
    """Return `cluster.ep` of a spec file; 1 if it is absent or malformed, which the check of the whole spec reports."""
    cluster = tree.get("cluster")
    ep = cluster.get("ep", 1) if isinstance(cluster, dict) else 1
    return ep if isinstance(ep, int) and ep > 0 else 1


def _solved(moe: Tree, own: Tree, match: MatchSpec, trunk: Tree, ep: int, what: str) -> Tree:
    """Return the `moe` section with the keys that `match` solves, except those that the user gave."""
    unknown = dict.fromkeys(SOLVED[match.by] - own.keys(), MOST)
    model = _model(trunk, {**moe, **unknown}, what)
    d_expert, experts = solve(model, _reference_model(match.to, trunk, moe, what), match, own.keys(), ep)
    return {**moe, "d_expert": d_expert, "experts": experts}


def _reference(value: Any, trunk: Tree, moe: Tree, what: str) -> ReferenceSpec:
    """Return the reference, from the name of a preset or from a section that the user wrote."""
    if isinstance(value, str):
        return ReferenceSpec(name=value, moe=_reference_model(value, trunk, moe, what).moe)
    _refuse_what_is_no_section(value, "reference", what)
    reference = checked(ReferenceSpec, value, what, below="reference.")
    _model(trunk, None if reference.moe is None else reference.moe.model_dump(), f"{what}, reference {reference.name}")
    return reference


def _reference_model(name: str, trunk: Tree, moe: Tree, what: str) -> ModelSpec:
    """Return a preset's experts on this trunk, in the same layers as the model that it is compared with."""
    found = _experts_on(find_preset(name), trunk, what)
    if found is not None and "every" in moe:
        found["every"] = moe["every"]
    return _model(trunk, found, f"{what}, reference {name}")


def _experts_on(preset: Preset, trunk: Tree, what: str) -> Tree | None:
    if preset.moe is None:
        return None
    moe = preset.moe(trunk)
    return _solved(moe, {}, preset.match, trunk, 1, what) if preset.match else moe


def _model(trunk: Tree, moe: Tree | None, what: str) -> ModelSpec:
    """Return the checked model of a trunk and a `moe` section. If some layers are dense and the trunk gives no width
    for them, they get the usual one."""
    fitting = _without_unused_width(trunk, moe)
    if trunk.get("d_ff") is None and fitting is trunk and "d_model" in trunk:
        fitting = {**trunk, "d_ff": dense_width(trunk)}
    return checked(ModelSpec, {**fitting, "moe": moe}, what, below="model.")


def _without_unused_width(trunk: Tree, moe: Tree | None) -> Tree:
    """Return the trunk without its width for dense layers if no layer is dense: that the preset has one is not the
    user's mistake."""
    return {**trunk, "d_ff": None} if moe is not None and moe.get("every") == 1 else trunk


def _refuse_what_would_be_ignored(short: Shorthands, tree: Tree, own_moe: Tree, what: str) -> None:
    if short.size and not short.preset:
        raise SpecError(what, "'size' is given without a preset, so it would be ignored", "add preset, or remove size")
    if short.match is None:
        return
    if tree.get("reference") is not None:
        why = f"a reference is given, but a matched model is compared with what it matches ({short.match.to})"
        raise SpecError(what, why, "remove reference or match")
    both = sorted(SOLVED[short.match.by] & own_moe.keys())
    if both:
        keys = " and ".join(f"model.moe.{key}" for key in both)
        raise SpecError(what, f"{keys} would be ignored, because match solves it", "remove it, or remove match")


def _refuse_what_is_no_section(value: Any, name: str, what: str, instead: str = "") -> None:
    if not isinstance(value, dict):
        raise SpecError(what, f"{name!r} is a value, not a section", f"write its keys below it{instead}")


def _merged(base: Any, over: Any) -> Any:
    """Return `over` merged into `base`, key by key; `over` takes precedence."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}
