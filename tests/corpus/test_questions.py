"""Tests of the question sample: its concepts, the truth of its answers and labels, and its files."""

import json
import math
from collections import Counter, defaultdict

import pytest

from mhmoe_ray.corpus.compose import seeded_generator
from mhmoe_ray.corpus.questions import (
    COLOURS,
    SceneShape,
    draw_objects,
    draw_scene,
    random_sentence,
    scene_questions,
    write_question_sample,
)
from tests.cli.run import mhmoe
from tests.data.sources.read import read_source

COUNTS = {"train": (30, 12), "test": (6, 3)}


def test_no_shape_of_the_test_is_in_the_training():
    generator = seeded_generator("shapes")
    shapes = {
        split: {o.shape for _ in range(200) for o in draw_objects(split, generator)} for split in ("train", "test")
    }
    assert not shapes["train"] & shapes["test"]
    assert sorted(map(len, shapes.values())) == [3, 5]


def test_objects_are_drawn_at_their_places_in_their_colours():
    generator = seeded_generator("test")
    for number in range(100):
        scene = draw_objects("test" if number % 2 else "train", generator)
        image = draw_scene(scene, generator)
        for o in scene:
            distance = 0.75 * o.radius if o.shape == "ring" else 0
            pixel = image.getpixel((int(o.x + distance), int(o.y)))
            # Edges are smoothed, so a pixel of a small object may have a part of the background.
            assert min(COLOURS, key=lambda name: math.dist(COLOURS[name], pixel)) == o.colour
        assert len({(int(o.x // 16), int(o.y // 16)) for o in scene}) == len(scene)


def test_questions_have_the_answers_that_a_person_gives():
    scene = [
        SceneShape("red", "star", 8, 8, 3.5),
        SceneShape("red", "ring", 40, 8, 3.5),
        SceneShape("blue", "circle", 24, 40, 6),
        SceneShape("black", "circle", 8, 40, 3.5),
    ]
    generator, answers = seeded_generator("answers"), defaultdict(set)
    for _ in range(300):
        for question, answer in scene_questions(scene, generator):
            answers[question].add(answer)
    assert answers == {
        "how many objects are there?": {"4"},
        **{f"how many {name} objects are there?": {"0"} for name in ("green", "yellow", "purple")},
        "how many blue objects are there?": {"1"},
        "how many black objects are there?": {"1"},
        "how many red objects are there?": {"2"},
        "what color is the large object?": {"blue"},
        "is the black object left of the blue object?": {"yes"},
        "is the blue object left of the black object?": {"no"},
        "is the blue object larger than the black object?": {"yes"},
        "is the black object larger than the blue object?": {"no"},
    }


def test_sentences_are_true_of_the_scenes_that_they_describe():
    left_scene, right_scene = [SceneShape("red", "star", 8, 8, 3)] * 2, [SceneShape("blue", "star", 8, 8, 3)]
    generator, truths = seeded_generator("sentences"), {}
    for _ in range(2000):
        sentence, is_true = random_sentence(generator)
        truths[sentence] = is_true(left_scene, right_scene)
    assert truths["the left image has more objects than the right image"]
    assert not truths["both images have the same number of objects"]
    assert truths["the left image has a red object"]
    assert not truths["the right image has a red object"]
    assert not truths["both images have a blue object"]
    assert truths["at least one image has a blue object"]
    assert not truths["at least one image has a green object"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    assert write_question_sample(folder, counts=COUNTS)["train"][1] == 48
    return folder


def test_the_readers_of_the_originals_read_all_of_it(sample):
    for name, format in (("vqa", "vqa"), ("nlvr2", "nlvr2")):
        items, tally = read_source(sample / name / "train", format=format)
        assert tally.bad_lines == 0
        assert len(items) >= 48


def test_each_sentence_is_true_of_half_of_its_pairs(sample):
    labels = defaultdict(Counter)
    for line in (sample / "nlvr2" / "train" / "train.json").read_text().splitlines():
        fields = json.loads(line)
        labels[fields["identifier"].split("-")[1]][fields["label"]] += 1
    assert len(labels) == 12
    assert all(counts == {"True": 2, "False": 2} for counts in labels.values())


def test_a_seed_gives_the_same_files(sample, tmp_path):
    write_question_sample(tmp_path / "again", counts=COUNTS)
    write_question_sample(tmp_path / "other", 1, COUNTS)
    files = sorted(path.relative_to(sample) for path in sample.rglob("*.*"))
    assert all((tmp_path / "again" / file).read_bytes() == (sample / file).read_bytes() for file in files)
    image = "vqa/train/train/COCO_train_000000000001.jpg"
    assert (tmp_path / "other" / image).read_bytes() != (sample / image).read_bytes()


def test_the_command_writes_one_sample_at_a_time(tmp_path):
    result = mhmoe(tmp_path, "data", "sample", "data", "--questions", "--scenes")
    assert result.code == 2
    assert "run the command once for each sample" in result.err
