"""Presets by name: families at a size, and the papers' models."""

import difflib

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.families import FAMILIES, SIZES, SizeName
from mhmoe_ray.planner.papers import models
from mhmoe_ray.planner.preset import Preset

DEFAULT_SIZE: SizeName = "tiny"


def find_preset(name: str, size: SizeName | None = None) -> Preset:
    """The preset of this name.

    Args:
        name: of a family, or of one of the papers' models.
        size: of a family; tiny where none is given.

    Raises:
        SpecError: there is none, or a size is given for a model that has its own.
    """
    if name in FAMILIES:
        return FAMILIES[name].at(size or DEFAULT_SIZE)
    if name not in models():
        near = difflib.get_close_matches(name, [*FAMILIES, *models()], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SpecError(f"preset {name}", "there is none of this name", f"{hint}`mhmoe presets` lists them all")
    if size is not None:
        why = "it is a published model of its own size, so `size` would be ignored"
        raise SpecError(f"preset {name}", why, f"leave out size, or take a family: {', '.join(FAMILIES)}")
    return models()[name]


def every_preset() -> list[tuple[str, SizeName | None, Preset]]:
    """All of them as (name, size, preset)."""
    families = [(name, size, family.at(size)) for size in SIZES for name, family in FAMILIES.items()]
    return [*families, *((name, None, preset) for name, preset in models().items())]


def origin(name: str, size: SizeName | None) -> str:
    """What a spec says of the preset that it came from."""
    return f"{name} {size or DEFAULT_SIZE}" if name in FAMILIES else name


def about(origin: str) -> str:
    """What the preset is that a spec names as its origin."""
    name, _, size = origin.partition(" ")
    found = (preset.about for n, s, preset in every_preset() if n == name and (not size or s == size))
    return next(found, "a preset of another version")
