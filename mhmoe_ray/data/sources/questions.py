"""Readers of VQAv2's questions about images, and of NLVR2's sentences about two images.

VQAv2: a file `..._questions.json` has `data_subtype` (train2014) and `questions`, a list of {question_id, image_id,
question}. The file `..._annotations.json` beside it has `annotations`, a list of {question_id, answers}, with ten
{answer}. An image is named COCO_SUBTYPE_NNNNNNNNNNNN.jpg, and is in a folder SUBTYPE.

NLVR2: a line is {sentence, label, identifier, directory}. The identifier SPLIT-SET-PAIR-SENTENCE names the images
SPLIT-SET-PAIR-img0.png and -img1.png, which are in a folder SPLIT or images/SPLIT, or in its subfolder `directory`.

These folders are looked for beside the file and in its parent.
"""

import re
from collections.abc import Iterator
from typing import Any

import orjson

from mhmoe_ray.data.images.annotations import Annotation, pack
from mhmoe_ray.data.sources.answer_text import ANNOTATORS, most_frequent_answer
from mhmoe_ray.data.sources.coco import ImageFinder
from mhmoe_ray.data.sources.images import check_image, image_document, image_hash
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, Fault, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.records import describe_keys, json_type, read_records, text_problem
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.spec import SourceSpec
from mhmoe_ray.storage import short_message

_IDENTIFIER = re.compile(r"(?P<split>[^/.]+)-(?P<set>\d+)-(?P<pair>\d+)-(?P<sentence>\d+)")
LABELS = ("False", "True")
"""Labels of sentences; the index of a label is its class."""


def read_vqa(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the questions of one of VQAv2's files; `Document.line` is the number of the question."""
    columns, annotations = source.sample_columns, dict[Any, Any]()
    try:
        tree = _parse_lists(storage, file.path, "questions")
        if "class" in columns:
            entries = _parse_lists(storage, annotations_path(file.path), "annotations")
            annotations = {
                entry.get("question_id"): entry.get("answers")
                for entry in entries["annotations"]
                if isinstance(entry, dict) and isinstance(entry.get("question_id"), int | str)
            }
    except DamageError as damage:
        yield BadLine(file.path, 1, Reason.PART_LOST, damage.reason)
        return
    subtype = str(tree.get("data_subtype"))
    # The images of the split test-dev2015 are those of test2015.
    subtype = subtype.replace("-dev", "")
    finder = ImageFinder(storage, file.path, [f"{subtype}/"])
    previous_id, image = None, None
    for number, entry in enumerate(tree["questions"], start=1):
        tally.bytes_read = file.size * number // len(tree["questions"])
        fields = entry if isinstance(entry, dict) else {}
        question_id, image_id = fields.get("question_id"), fields.get("image_id")
        if not isinstance(question_id, int | str):
            yield BadLine(file.path, number, Reason.NO_TEXT, f"no question_id among {describe_keys(fields)}")
            continue
        # The questions about an image mostly follow each other.
        if "image" in columns and (image is None or image_id != previous_id):
            image, previous_id = _read_vqa_image(finder, subtype, image_id, settings), image_id
        question = fields.get("question")
        if not isinstance(question, str):
            question = Fault(Reason.NO_TEXT, f"its question is {json_type(question)}")
        annotation = _answers(question_id, annotations.get(question_id)) if "class" in columns else None
        yield image_document(
            file.path, number, f"question {question_id}", image, question, columns, annotation=annotation
        )


def annotations_path(path: str) -> str:
    """Return the path of the answers to the questions in a file."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.replace("OpenEnded_", "").replace("questions", "annotations")


def _parse_lists(storage: Storage, path: str, key: str) -> dict[str, Any]:
    """Parse a JSON file with a list `key`; an unusable file raises DamageError."""
    try:
        with storage.open(path) as stream:
            tree = orjson.loads(stream.read())
    except FileNotFoundError as e:
        raise DamageError(f"its {key} are missing: there is no file {path}") from e
    except OSError as e:
        raise DamageError(f"{path}: {short_message(e)}") from e
    except ValueError as e:
        raise DamageError(f"{path} is not JSON: {e}") from e
    if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
        raise DamageError(f"{path} has no list {key!r}")
    return tree


def _read_vqa_image(finder: ImageFinder, subtype: str, image_id: object, settings: ReadSettings) -> bytes | Fault:
    if not isinstance(image_id, int) or isinstance(image_id, bool):
        return Fault(Reason.NO_IMAGE, f"its image_id is {json_type(image_id)}, and a question has one image")
    name = f"COCO_{subtype}_{image_id:012d}.jpg"
    return check_image(finder.read_image(name, settings.document_bytes), settings)


def _answers(question_id: int | str, answers: object) -> bytes | Fault:
    """Return the encoded annotation of a question, or the reason why its answers cannot be used."""
    if not isinstance(answers, list):
        return Fault(Reason.NO_ANSWER, "it is not among the annotations")
    texts = [entry.get("answer") if isinstance(entry, dict) else None for entry in answers]
    valid_texts = [text for text in texts if isinstance(text, str) and text_problem(text) is None]
    if len(valid_texts) != len(texts) or len(texts) != ANNOTATORS:
        return Fault(Reason.NO_ANSWER, f"{len(valid_texts)} of {len(texts)} are texts, and {ANNOTATORS} are needed")
    return pack(Annotation(most_frequent_answer(valid_texts), image_id=question_id, answers=tuple(valid_texts)))


def read_nlvr2(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the sentences of one of NLVR2's files."""
    finders, columns = dict[str, ImageFinder](), source.sample_columns
    for record in read_records(storage, file, settings.document_bytes, tally):
        if isinstance(record, BadLine):
            yield record
            continue
        fields = record.fields if isinstance(record.fields, dict) else {}
        identifier = str(fields.get("identifier"))
        match = _IDENTIFIER.fullmatch(identifier)
        if match is None:
            detail = f"{identifier[:100]!r} is no identifier such as dev-850-0-0"
            yield BadLine(file.path, record.line, Reason.NO_IMAGE, detail)
            continue
        split, folder = match["split"], f"{fields['directory']}/" if "directory" in fields else ""
        if split not in finders:
            finders[split] = ImageFinder(storage, file.path, [f"{split}/", f"images/{split}/"])
        images = [
            _read_named_image(finders[split], f"{folder}{split}-{match['set']}-{match['pair']}-img{i}.png", settings)
            for i in range(2 if "image" in columns else 0)
        ]
        label, sentence = str(fields.get("label")), fields.get("sentence")
        annotation: bytes | Fault | None = None
        if "class" in columns:
            annotation = (
                pack(Annotation(label, image_id=f"{split}-{match['set']}-{match['sentence']}"))
                if label in LABELS
                else Fault(Reason.NO_CLASS, f"its label is {label[:100]!r}, not 'True' or 'False'")
            )
        if not isinstance(sentence, str):
            sentence = Fault(Reason.NO_TEXT, f"its sentence is {json_type(sentence)}")
        faults = [image for image in images if isinstance(image, Fault)]
        item = image_document(
            file.path,
            record.line,
            identifier,
            next(iter(faults or images), None),
            sentence,
            columns,
            annotation=annotation,
        )
        if isinstance(item, Document) and images:
            # Both images decide which sentences are held out together.
            first_image, second_image = (image for image in images if isinstance(image, bytes))
            item = item._replace(second_image=second_image, image_hash=image_hash(first_image + second_image))
        yield item


def _read_named_image(finder: ImageFinder, name: str, settings: ReadSettings) -> bytes | Fault:
    """Return an image, or a fault with the image's name in its detail."""
    image = check_image(finder.read_image(name, settings.document_bytes), settings)
    return image._replace(detail=f"{name}: {image.detail}") if isinstance(image, Fault) else image
