"""The question sample: drawn scenes with questions in VQAv2's format, and sentences about two scenes in NLVR2's.

    DIR/vqa/SPLIT/v2_OpenEnded_mscoco_SPLIT_questions.json   questions; v2_mscoco_SPLIT_annotations.json has the answers
    DIR/vqa/SPLIT/SPLIT/COCO_SPLIT_NNNNNNNNNNNN.jpg          scenes
    DIR/nlvr2/SPLIT/SPLIT.json                               sentences
    DIR/nlvr2/SPLIT/SPLIT/SPLIT-SET-PAIR-img0.png            the first scene of a pair

SPLIT is train or test. A scene has one to four objects, and the shapes of the test are not in the training. Texts name
colours, sizes and places. So that a text alone tells little, the answer of a count is chosen first, and a sentence is
true of two of its four pairs of scenes.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mhmoe_ray.corpus.compose import seeded_generator
from mhmoe_ray.data.images.files import require_pillow
from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, CELLS = 16, 3
"""Width of a cell in pixels, and number of cells in a row; a scene has at most one object in each of its cells."""
SIDE = CELL * CELLS
"""Width and height of a scene in pixels."""
COUNTS = {"train": (4000, 2000), "test": (500, 250)}
"""Number of scenes with questions, and of sentences, by split."""
QUESTIONS_PER_SCENE = 4
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
    "black": (20, 20, 20),
}
SHAPES = {"train": ("circle", "square", "triangle", "star", "ring"), "test": ("cross", "diamond", "hexagon")}
"""Shapes of the objects of each split."""
RADII = ((3.0, 4.0), (5.5, 7.0))
"""Ranges of the radius of small and of large objects in pixels."""
LARGEST_COUNT = 4
_MIDDLE_RADIUS = 4.75
_SMALLEST_DISTANCE = 8.0
"""Smallest distance in pixels by which an object is left of another."""
_DRAWING_SCALE = 4
_JPEG_QUALITY = 95


class SceneShape(NamedTuple):
    """An object of a drawn scene, with its centre and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


DrawnScene = Sequence[SceneShape]
Question = tuple[str, str]
"""A question and its answer."""


def draw_objects(split: str, generator: np.random.Generator) -> list[SceneShape]:
    """Return the objects of a random scene, each at a random place in a cell of its own."""
    scene, count = list[SceneShape](), int(generator.integers(1, LARGEST_COUNT + 1))
    for cell in generator.permutation(CELLS**2)[:count].tolist():
        radius = generator.uniform(*RADII[generator.integers(2)])
        x, y = (CELL * corner + generator.uniform(radius, CELL - radius) for corner in divmod(cell, CELLS))
        colour, shape = (names[generator.integers(len(names))] for names in (list(COLOURS), SHAPES[split]))
        scene.append(SceneShape(colour, shape, x, y, radius))
    return scene


def draw_scene(scene: DrawnScene, generator: np.random.Generator) -> "Image":
    """Draw the objects on a light background of random colour."""
    from PIL import Image, ImageDraw

    scale, background = _DRAWING_SCALE, tuple(generator.integers(190, 256, 3).tolist())
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), background)
    canvas = ImageDraw.Draw(image)
    for o in scene:
        colour, x, y, r = COLOURS[o.colour], o.x * scale, o.y * scale, o.radius * scale
        if o.shape in ("circle", "ring"):
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            if o.shape == "ring":
                canvas.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=background)
        else:
            canvas.polygon([(x + r * u, y + r * v) for u, v in _outline(o.shape)], fill=colour)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape of radius 1 around the origin."""
    if shape == "cross":
        quarter = [(0.35, -1.0), (0.35, -0.35), (1.0, -0.35)]
        return [(c * u - s * v, s * u + c * v) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for u, v in quarter]
    corners, start = {
        "square": (4, 0.125),
        "diamond": (4, 0.25),
        "triangle": (3, 0.25),
        "hexagon": (6, 0.25),
        "star": (10, 0.25),
    }[shape]
    radii = [0.4 if shape == "star" and i % 2 else 1.0 for i in range(corners)]
    angles = [2 * math.pi * (i / corners - start) for i in range(corners)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in zip(radii, angles, strict=True)]


def scene_questions(scene: DrawnScene, generator: np.random.Generator) -> list[Question]:
    """Return one random question of each kind that has a clear answer in a scene."""

    def choose(items: Sequence[Any]) -> Any:
        return items[int(generator.integers(len(items)))]

    colour_counts = {name: sum(o.colour == name for o in scene) for name in COLOURS}
    count = choose(sorted(set(colour_counts.values())))
    counted_colour = choose([name for name, n in colour_counts.items() if n == count])
    questions = [
        ("how many objects are there?", str(len(scene))),
        (f"how many {counted_colour} objects are there?", str(count)),
    ]
    small_objects, large_objects = (
        [o for o in scene if (o.radius > _MIDDLE_RADIUS) == is_large] for is_large in (0, 1)
    )
    for size, objects in (("small", small_objects), ("large", large_objects)):
        if len(objects) == 1:
            questions.append((f"what color is the {size} object?", objects[0].colour))
    # An object is named by its colour if it is the only one of that colour.
    named_objects = [o for o in scene if colour_counts[o.colour] == 1]
    named_pairs = [(o, p) for o in named_objects for p in named_objects if o is not p]
    if pairs := [(o, p) for o, p in named_pairs if abs(o.x - p.x) > _SMALLEST_DISTANCE]:
        o, p = choose(pairs)
        questions.append((f"is the {o.colour} object left of the {p.colour} object?", "yes" if o.x < p.x else "no"))
    if pairs := [(o, p) for o, p in named_pairs if (o in small_objects) != (p in small_objects)]:
        o, p = choose(pairs)
        answer = "yes" if o.radius > p.radius else "no"
        questions.append((f"is the {o.colour} object larger than the {p.colour} object?", answer))
    return questions


def random_sentence(generator: np.random.Generator) -> tuple[str, Callable[[DrawnScene, DrawnScene], bool]]:
    """Return a random sentence about two scenes, and the function that tells its truth."""
    colour = list(COLOURS)[generator.integers(len(COLOURS))]
    noun = f"{colour} object"

    def shows(scene: DrawnScene) -> bool:
        return any(o.colour == colour for o in scene)

    sentences: list[tuple[str, Callable[[DrawnScene, DrawnScene], bool]]] = [
        ("the left image has more objects than the right image", lambda a, b: len(a) > len(b)),
        ("both images have the same number of objects", lambda a, b: len(a) == len(b)),
        (f"the left image has a {noun}", lambda a, b: shows(a)),
        (f"the right image has a {noun}", lambda a, b: shows(b)),
        (f"both images have a {noun}", lambda a, b: shows(a) and shows(b)),
        (f"at least one image has a {noun}", lambda a, b: shows(a) or shows(b)),
    ]
    return sentences[generator.integers(len(sentences))]


def write_question_sample(
    folder: Path, seed: int = 0, counts: dict[str, tuple[int, int]] = COUNTS
) -> dict[str, tuple[int, int]]:
    """Write the question sample below `folder`; return the numbers of questions and of pairs of scenes by split.

    The same seed gives the same scenes. A missing Pillow, or a folder that cannot be written, is a DataError.
    """
    require_pillow()
    sample_counts = {}
    try:
        for split, (scenes, sentences) in counts.items():
            questions = _write_questions(folder / "vqa" / split, split, scenes, seed)
            sample_counts[split] = questions, _write_sentences(folder / "nlvr2" / split, split, sentences, seed)
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return sample_counts


def _write_questions(folder: Path, split: str, scenes: int, seed: int) -> int:
    (folder / split).mkdir(parents=True, exist_ok=True)
    questions, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for image_id in range(1, scenes + 1):
        generator = seeded_generator(f"questions {split} {seed} {image_id}")
        scene = draw_objects(split, generator)
        image = draw_scene(scene, generator)
        image.save(folder / split / f"COCO_{split}_{image_id:012d}.jpg", quality=_JPEG_QUALITY)
        candidates = scene_questions(scene, generator)
        for number in generator.permutation(len(candidates))[:QUESTIONS_PER_SCENE].tolist():
            question, answer = candidates[number]
            ids = {"image_id": image_id, "question_id": len(questions) + 1}
            questions.append({**ids, "question": question})
            answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
            annotations.append({**ids, "multiple_choice_answer": answer, "answers": answers})
    header = {"data_type": "mscoco", "data_subtype": split}
    questions_file = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    questions_file.write_text(json.dumps({**header, "questions": questions}))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({**header, "annotations": annotations}))
    return len(questions)


def _write_sentences(folder: Path, split: str, sentences: int, seed: int) -> int:
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(sentences):
        generator = seeded_generator(f"sentences {split} {seed} {number}")
        sentence, is_true = random_sentence(generator)
        for pair, (label, scenes) in enumerate(_balanced_pairs(split, is_true, generator)):
            for i, scene in enumerate(scenes):
                image = draw_scene(scene, generator)
                image.save(folder / split / f"{split}-{number}-{pair}-img{i}.png")
            identifier = f"{split}-{number}-{pair}-0"
            lines.append(json.dumps({"sentence": sentence, "label": str(label), "identifier": identifier}))
    (folder / f"{split}.json").write_text("\n".join(lines) + "\n")
    return len(lines)


def _balanced_pairs(
    split: str, is_true: Callable[[DrawnScene, DrawnScene], bool], generator: np.random.Generator
) -> Iterator[tuple[bool, tuple[DrawnScene, DrawnScene]]]:
    """Yield two pairs of scenes of which a sentence is true, and two of which it is false."""
    for label in (True, True, False, False):
        while is_true(*(scenes := (draw_objects(split, generator), draw_objects(split, generator)))) != label:
            pass
        yield label, scenes
