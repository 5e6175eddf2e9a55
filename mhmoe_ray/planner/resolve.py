"""From a spec file as users write it to a whole spec. Beside the sections it may hold

preset: mhmoe                  a model with its recipe, by name; the sections override it key by key
size: tiny                     of a family of presets
match: {to: smoe, by: both}    expert width and count are solved, not given
reference: smoe                what `plan` compares the model with, where not what its preset or match says
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.families import SizeName
from mhmoe_ray.planner.match import SOLVED, MatchSpec, solve
from mhmoe_ray.planner.preset import Preset, Tree
from mhmoe_ray.planner.presets import find_preset
from mhmoe_ray.spec import ModelSpec, ReferenceSpec, RunSpec, checked, read_tree
from mhmoe_ray.spec.base import Section


class Shorthands(Section):
    preset: str | None = None
    size: SizeName | None = None
    match: MatchSpec | None = None
    reference: str | ReferenceSpec | None = None


def resolve_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """The whole spec; a whole spec resolves to itself.

    Args:
        path: a YAML file.
        overrides: `key.path=value` strings, for shorthands too.

    Raises:
        SpecError: as `load_spec`; or there is no such preset, or a match has no solution.
    """
    what = f"spec {path}"
    tree = _worked_out(read_tree(path, overrides), what)
    return checked(RunSpec, tree, what, also=list(Shorthands.model_fields))


def models_of(preset: Preset) -> tuple[ModelSpec, ModelSpec | None]:
    """A preset's model as it stands, and its reference on the same trunk."""
    trunk, what = dict(preset.trunk), "preset"
    moe = _experts_on(preset, trunk, what)
    model = checked(ModelSpec, {**_fitting_trunk(trunk, moe), "moe": moe}, what)
    return model, _reference_model(preset.reference, trunk, what) if preset.reference else None


def _worked_out(tree: Tree, what: str) -> Tree:
    given = {key: tree.pop(key) for key in Shorthands.model_fields if key in tree}
    short = checked(Shorthands, given, what)
    _refuse_what_would_be_ignored(short, what)
    own_model = tree.get("model", {})
    _refuse_what_is_no_section(own_model, "model", what)
    _refuse_what_is_no_section(own_model.get("moe") or {}, "model.moe", what)
    preset = find_preset(short.preset, short.size) if short.preset else None
    if preset:
        fragment = {"model": dict(preset.trunk), "train": dict(preset.train), "data": {"seq_len": preset.seq_len}}
        tree = _merged(fragment, tree)
    if "model" in tree:
        model = _with_experts(tree["model"], preset, short.match, what)
        tree["model"] = _fitting_trunk(model, model.get("moe")) if "d_ff" not in own_model else model
    reference = preset.reference if preset and "reference" not in given else short.reference
    if short.match:
        reference = short.match.to
    if isinstance(reference, str):
        reference = ReferenceSpec(name=reference, moe=_reference_model(reference, _trunk(tree["model"]), what).moe)
    if reference:
        tree["reference"] = reference
    return tree


def _with_experts(model: Tree, preset: Preset | None, match: MatchSpec | None, what: str) -> Tree:
    """The model with the preset's experts under the user's own keys, as wide and as many as a match makes them."""
    own, trunk = model.get("moe", {}), _trunk(model)
    base = preset.moe(trunk.get("d_ff")) if preset and preset.moe and own is not None else {}
    moe = {**base, **(own or {})}
    if match:
        if not moe:
            raise SpecError(what, "'match' is for experts, and this model has none", "remove match, or add model.moe")
        _refuse_what_match_solves(own, match, what)
    elif preset and moe:
        match = preset.match
    if match:
        moe = _solved(moe, own, match, trunk, what)
    return {**model, "moe": moe} if moe else model


def _solved(moe: Tree, own: Tree, match: MatchSpec, trunk: Tree, what: str) -> Tree:
    """Expert layers with the keys that `match` solves, as far as the user's own keys do not say otherwise."""
    if own.keys() >= SOLVED[match.by]:
        return moe
    unknown = {"d_expert": 1, "experts": 1 << 16} if match.by == "both" else {"d_expert": 1}
    tree = {**_fitting_trunk(trunk, moe), "moe": {**moe, **unknown}}
    model = checked(ModelSpec, tree, what, below="model.")
    d_expert, experts = solve(model, _reference_model(match.to, trunk, what), match)
    return {**moe, "d_expert": d_expert, "experts": experts, **own}


def _reference_model(name: str, trunk: Tree, what: str) -> ModelSpec:
    """The expert layers of a preset on this trunk."""
    moe = _experts_on(find_preset(name), trunk, what)
    tree = {**_fitting_trunk(trunk, moe), "moe": moe}
    return checked(ModelSpec, tree, f"{what}, {name} on its trunk", below="model.")


def _fitting_trunk(trunk: Tree, moe: Tree | None) -> Tree:
    """Without a width for dense layers where these experts leave none."""
    return {**trunk, "d_ff": None} if moe and moe.get("every") == 1 else trunk


def _experts_on(preset: Preset, trunk: Tree, what: str) -> Tree | None:
    if preset.moe is None:
        return None
    moe = preset.moe(trunk.get("d_ff"))
    return _solved(moe, {}, preset.match, trunk, what) if preset.match else moe


def _refuse_what_is_no_section(value: Any, name: str, what: str) -> None:
    if not isinstance(value, dict):
        raise SpecError(what, f"{name!r} is a value, not a section", "write its keys below it")


def _refuse_what_would_be_ignored(short: Shorthands, what: str) -> None:
    if short.size and not short.preset:
        raise SpecError(what, "'size' is given without a preset, so it would be ignored", "add preset, or remove size")
    if short.match and short.reference:
        why = f"a reference is given, but a matched model is compared with what it matches ({short.match.to})"
        raise SpecError(what, why, "remove reference or match")


def _refuse_what_match_solves(own: Tree, match: MatchSpec, what: str) -> None:
    both = sorted(SOLVED[match.by] & own.keys())
    if both:
        keys = " and ".join(f"model.moe.{key}" for key in both)
        raise SpecError(what, f"{keys} would be ignored, because match solves it", "remove it, or remove match")


def _merged(base: Any, over: Any) -> Any:
    """`over` key by key on top of `base`."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def _trunk(model: Tree) -> Tree:
    return {key: value for key, value in model.items() if key != "moe"}
