"""The objects of composed scenes: their classes, and the split of the sample into training, validation and test.

A class of objects collects subgroups of emoji and folders of stamps that look alike.
"""

import re
from dataclasses import dataclass
from hashlib import blake2b

from mhmoe_ray.corpus.captions import Concept, base_key

VALIDATION_SHARE, TEST_SHARE = 0.10, 0.15
"""Shares of the concepts and of the backgrounds that are held out from training."""
_SPLIT_SALT = "29"
"""Prefix of names before they are hashed, chosen so that even small classes such as hands are in every split."""

OBJECT_CLASSES = {
    "animal": re.compile(r"animal-.*|animals/.*"),
    "clothing": re.compile(r"clothing|clothes(/.*)?"),
    "face": re.compile(r"face-(?!costume).*|symbols/faces"),
    "flag": re.compile(r"(.+-)?flag|town/flags"),
    "food": re.compile(r"food-(?!marine).*|food(/.*)?"),
    "hand": re.compile(r"hand-.*|hands"),
    "person": re.compile(r"person(-fantasy|-gesture|-role)?"),
    "vehicle": re.compile(r"transport-(air|ground|water)|vehicles(/.*)?"),
}
"""Patterns of the emoji subgroups and stamp folders of each class of objects."""
_OTHER_NAMES = frozenset(
    {
        "A bicycle wheel.",
        "A button.",
        "A couple of wings.",
        "A modern clothespin.",
        "A tire.",
        "A tractor wheel.",
        "A train sign.",
        "A wheel! Put the brake calipers toward the rear.",
        "A wooden clothes hanger.",
        "An old-fashioned clothespin.",
        "Police car emblems to put on the sedan.",
        "anchor",
        "bus stop",
        "construction",
        "coral",
        "feather",
        "fuel pump",
        "gem stone",
        "hair pick",
        "horizontal traffic light",
        "lipstick",
        "microbe",
        "motorway",
        "oil drum",
        "paw prints",
        "pig nose",
        "police car light",
        "prayer beads",
        "railway track",
        "ring buoy",
        "salt",
        "seat",
        "spider web",
        "station",
        "stop sign",
        "vertical traffic light",
        "wheel",
        "wing",
    }
)
"""Names of concepts that scenes leave out, because they look unlike the rest of their subgroup or folder."""
_ADULTS = re.compile(r"\b1f46[89]\b")
_RIGHT_FACING = "-200d-27a1"


@dataclass(frozen=True)
class Drawing:
    """A drawing that a scene can contain: a PNG file with alpha, its artist, and the key of its concept."""

    key: str
    artist: str
    png: bytes


def object_class(concept: Concept) -> str | None:
    """Return the object class of a concept; None if scenes do not contain the concept."""
    if concept.name in _OTHER_NAMES:
        return None
    return next((name for name, pattern in OBJECT_CLASSES.items() if pattern.fullmatch(concept.class_name)), None)


def likeness_key(key: str) -> str:
    """Return a key that is the same for concepts that look almost alike.

    These are variants in skin tone, sex and direction: "man astronaut" and "woman astronaut" share a key.
    """
    return _ADULTS.sub("1f9d1", base_key(key.removesuffix(_RIGHT_FACING)))


def split_of(name: str) -> str:
    """Return the split that a hash selects for a likeness key or the name of a background."""
    position = int.from_bytes(blake2b(f"{_SPLIT_SALT} {name}".encode(), digest_size=8).digest()) / 2**64
    if position < VALIDATION_SHARE:
        return "validation"
    return "test" if position < VALIDATION_SHARE + TEST_SHARE else "train"
