"""Tests of VQAv2's questions and NLVR2's sentences: readers, unusable items, and the official rule of accuracy."""

import json
import random
import re

import numpy as np
import pytest

from mhmoe_ray.data.images.annotations import unpack
from mhmoe_ray.data.sources import BadLine, Document, find_files
from mhmoe_ray.data.sources.answer_text import answer_accuracy, most_frequent_answer, normalized_answer
from mhmoe_ray.data.sources.items import Reason
from mhmoe_ray.data.tokenizer.train import sample_texts
from tests.data.sources.read import data_spec, read_source
from tests.support.images import encode_image

ANSWERS = ["Two"] * 4 + ["2"] * 3 + ["the three"] * 3


def image(number, suffix="jpg"):
    return encode_image(np.full((16, 16, 3), 20 * number, np.uint8), suffix)


def write_questions(folder, questions, answers, subtype="train2014"):
    """Write VQAv2's two files, with images 1 to 3, and return the path of the questions."""
    (folder / subtype).mkdir(parents=True)
    for number in range(1, 4):
        (folder / subtype / f"COCO_{subtype}_{number:012d}.jpg").write_bytes(image(number))
    entries = [{"question_id": i, "image_id": n, "question": q} for i, n, q in questions]
    path = folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
    path.write_text(json.dumps({"data_subtype": subtype, "questions": entries}))
    annotations = [
        {"question_id": i, "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(texts, 1)]}
        for i, texts in answers.items()
    ]
    (folder / f"v2_mscoco_{subtype}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return path


def faults(items):
    return [(i.line, i.reason, i.detail) for i in items if isinstance(i, BadLine)]


def test_questions_have_their_image_and_answers(tmp_path):
    questions = [(11, 1, "how many?"), (12, 1, "what?"), (31, 3, "where?")]
    write_questions(tmp_path, questions, {11: ANSWERS, 12: ["yes"] * 10, 31: ["no"] * 10})
    items, tally = read_source(tmp_path, format="vqa")
    assert [(i.text, i.image) for i in items] == [("how many?", image(1)), ("what?", image(1)), ("where?", image(3))]
    annotation = unpack(items[0].annotation)
    assert (annotation.class_name, annotation.image_id, annotation.answers) == ("2", 11, tuple(ANSWERS))
    assert tally.bad_lines == 0
    # Without answers, the questions are texts with an image.
    [item, *_] = read_source(tmp_path, format="vqa", columns=["image", "text"])[0]
    assert (item.text, item.annotation) == ("how many?", None)


def test_unusable_questions_are_named_one_by_one(tmp_path):
    questions = [
        (1, 1, "ok?"),
        (2, 7, "gone?"),
        (3, [1, 2], "two images?"),
        (4, 1, "no answers?"),
        (5, 1, "three answers?"),
        (6, 1, 7),
        ([], 1, "no id?"),
    ]
    answers = {1: ["a"] * 10, 2: ["a"] * 10, 3: ["a"] * 10, 5: ["a"] * 3, 6: ["a"] * 10}
    path = write_questions(tmp_path, questions, answers)
    items, _ = read_source(path, format="vqa")
    assert [i.text for i in items if isinstance(i, Document)] == ["ok?"]
    fault_list = faults(items)
    assert [(line, reason) for line, reason, _ in fault_list] == [
        (2, Reason.NO_IMAGE),
        (3, Reason.NO_IMAGE),
        (4, Reason.NO_ANSWER),
        (5, Reason.NO_ANSWER),
        (6, Reason.NO_TEXT),
        (7, Reason.NO_TEXT),
    ]
    assert fault_list[0][2].startswith("question 2: no such file in ")
    assert fault_list[1][2] == "question 3: its image_id is a list, and a question has one image"
    assert fault_list[3][2] == "question 5: 3 of 3 are texts, and 10 are needed"
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    [(_, reason, detail)] = faults(read_source(path, format="vqa")[0])
    assert reason == Reason.PART_LOST
    assert "its annotations are missing: there is no file" in detail


def write_sentences(folder, records, split="dev"):
    (folder / split).mkdir(parents=True)
    for pair in range(2):
        for i in range(2):
            (folder / split / f"{split}-850-{pair}-img{i}.png").write_bytes(image(1 + 2 * pair + i, "png"))
    path = folder / f"{split}.json"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_sentences_have_two_images_and_a_label(tmp_path):
    records = [
        {"sentence": "there are two dogs", "label": "True", "identifier": "dev-850-0-1"},
        {"sentence": "there are two dogs", "label": "False", "identifier": "dev-850-1-1"},
        {"sentence": "one image is gone", "label": "True", "identifier": "dev-850-2-0"},
        {"sentence": "it is unsure", "label": "Maybe", "identifier": "dev-850-0-0"},
        {"sentence": "it is nowhere", "label": "True", "identifier": "../../etc"},
        {"sentence": None, "label": "True", "identifier": "dev-850-0-0"},
    ]
    path = write_sentences(tmp_path, records)
    (tmp_path / "dev" / "dev-850-2-img0.png").write_bytes(image(9, "png"))
    items, _ = read_source(path, format="nlvr2")
    documents = [i for i in items if isinstance(i, Document)]
    assert [(d.image, d.second_image) for d in documents] == [
        (image(1, "png"), image(2, "png")),
        (image(3, "png"), image(4, "png")),
    ]
    assert [(a.class_name, a.image_id) for d in documents for a in [unpack(d.annotation)]] == [
        ("True", "dev-850-1"),
        ("False", "dev-850-1"),
    ]
    fault_list = faults(items)
    assert [(line, reason) for line, reason, _ in fault_list] == [
        (3, Reason.NO_IMAGE),
        (4, Reason.NO_CLASS),
        (5, Reason.NO_IMAGE),
        (6, Reason.NO_TEXT),
    ]
    assert fault_list[0][2].startswith("dev-850-2-0: dev-850-2-img1.png: no such file in ")
    assert fault_list[1][2] == "dev-850-0-0: its label is 'Maybe', not 'True' or 'False'"


def test_images_of_the_training_split_are_in_numbered_folders(tmp_path):
    folder = tmp_path / "images" / "train" / "51"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"train-7-0-img{i}.png").write_bytes(image(i, "png"))
    record = {"sentence": "both", "label": "True", "identifier": "train-7-0-0", "directory": 51}
    (tmp_path / "train.json").write_text(json.dumps(record))
    [item] = read_source(tmp_path / "train.json", format="nlvr2")[0]
    assert item.second_image == image(1, "png")


CONTRACTIONS = {
    "dont": "don't", "couldnt've": "couldn't've", "couldn'tve": "couldn't've", "id've": "id've", "hes": "he's",
    "shes": "shes", "lets": "lets", "somebody'd": "somebodyd", "somebodyd've": "somebody'd've", "ow's'at": "'ow's'at",
    "yall": "y'all", "y'alld've": "y'all'd've", "twas": "'twas", "maam": "ma'am", "its": "its", "oclock": "o'clock",
}  # fmt: skip
WORDS = [
    *CONTRACTIONS,
    "a",
    "an",
    "the",
    "The",
    "dog",
    "Dogs",
    "none",
    "two",
    "TEN",
    "10",
    "3.5",
    "1,000",
    "eleven",
    "x.y",
]
MARKS = [*';/[]"{}()=+\\_-><@`,?!', ".", "..", ":", "'"]


def official_form(text):
    """Return an answer in the form of the official rule, written down step by step for the words of this test."""
    text = re.sub("[\n\t]", " ", text).strip()
    spaced_text = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        touches_space = re.search(rf"{re.escape(mark)} | {re.escape(mark)}", text)
        spaced_text = spaced_text.replace(mark, "" if touches_space or re.search("[0-9],[0-9]", text) else " ")
    characters, removed = [], 0
    for position, character in enumerate(spaced_text):
        if character == "." and removed < 32 and not spaced_text[position + 1 : position + 2].isdigit():
            removed += 1
        else:
            characters.append(character)
    digits = dict(
        zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True)
    )
    words = []
    for word in "".join(characters).lower().split():
        word = "0" if word == "none" else digits.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def official_accuracy(answer, annotated):
    """Return the mean over the ten groups of nine annotators of min(1, equal answers / 3)."""
    annotated, answer = [re.sub("[\n\t]", " ", a).strip() for a in annotated], re.sub("[\n\t]", " ", answer).strip()
    if any(a != annotated[0] for a in annotated):
        annotated, answer = [official_form(a) for a in annotated], official_form(answer)
    groups = [annotated[:i] + annotated[i + 1 :] for i in range(10)]
    return sum(min(1, sum(a == answer for a in group) / 3) for group in groups) / 10


def test_accuracy_is_that_of_the_official_rule_on_1000_random_cases():
    rng, accuracies = random.Random(7), []
    for _ in range(1000):
        texts = []
        for _ in range(rng.randint(1, 4)):
            pieces = [rng.choice(WORDS) + rng.choice([" ", "", *MARKS, " - ", ", "]) for _ in range(rng.randint(1, 4))]
            texts.append("".join(pieces) + rng.choice(["", "", ".", "\n"]))
            texts.append(rng.choice([texts[-1].upper(), f"the {texts[-1]}", f"{texts[-1]}!"]))
        for text in texts:
            assert normalized_answer(text) == official_form(text), text
        annotated = [rng.choice(texts) for _ in range(10)]
        answer = rng.choice(texts)
        accuracies.append(official_accuracy(answer, annotated))
        assert answer_accuracy(answer, annotated) == pytest.approx(accuracies[-1], abs=1e-12)
    assert len({round(accuracy, 6) for accuracy in accuracies}) >= 5


def test_accuracy_leaves_each_annotator_out():
    assert answer_accuracy("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    # If all annotators agree, the official script compares the texts as they are.
    assert answer_accuracy("yes", ["Yes"] * 10) == 0
    assert answer_accuracy("yes", ["Yes"] * 9 + ["no"]) == 1
    assert most_frequent_answer(["d", "b", "The B", "d", "c"]) == "b"


def test_the_tokenizer_is_trained_on_texts_without_reading_images(tmp_path):
    record = {"sentence": "there are two dogs", "label": "True", "identifier": "dev-1-0-0"}
    (tmp_path / "dev.json").write_text(json.dumps(record))
    write_questions(tmp_path / "vqa", [(1, 7, "how many?")], {})
    for path, format, text in (
        (tmp_path / "dev.json", "nlvr2", record["sentence"]),
        (tmp_path / "vqa", "vqa", "how many?"),
    ):
        spec = data_spec(path, format=format)
        # A sample of a short text is its beginning.
        sampled_text = "".join(sample_texts(find_files(spec), spec))
        assert sampled_text
        assert text.startswith(sampled_text)
