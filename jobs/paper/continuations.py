"""A task for lm-eval from documents that a run has held out: which of four pieces of text continues a passage.

The wrong pieces continue passages of other documents of the same domain.

    python jobs/paper/continuations.py RUN FOLDER
    mhmoe eval RUN --tasks continuations --task-folder FOLDER
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import Document, Reading, find_files
from mhmoe_ray.runs.directory import find_run
from mhmoe_ray.spec import DataSpec

TASK = """\
task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PASSAGE, PIECE = 320, 64
"""Approximate numbers of characters of a passage and of a piece; each ends where a word does."""
OF_A_DOMAIN = 80


def main(run: str, folder: Path) -> None:
    data = find_run(run, Path("runs")).spec().data
    chance, questions = random.Random(0), []
    for domain, pairs in sorted(passages(data).items()):
        chance.shuffle(pairs)
        pieces = sorted({piece for _, piece in pairs})
        if len(pieces) < 4:
            continue
        for passage, piece in pairs[:OF_A_DOMAIN]:
            choices = chance.sample([other for other in pieces if other != piece], 3)
            answer = chance.randrange(4)
            choices.insert(answer, piece)
            questions.append({"domain": domain, "passage": passage, "choices": choices, "answer": answer})
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "questions.jsonl").absolute()
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "continuations.yaml").write_text(TASK.format(questions=json.dumps(str(file))))
    print(f"{len(questions)} questions in {file}")


def passages(data: DataSpec) -> dict[str, list[tuple[str, str]]]:
    """Return pairs of a passage and its continuation, by domain.

    Every held-out document that is long enough gives one pair from its middle.
    """
    found = defaultdict(list)
    for file in find_files(data):
        for item in Reading(file, data):
            if isinstance(item, Document) and is_validation(item.text, data.validation_fraction):
                middle = len(item.text) // 2
                begin, cut, end = (_end_of_word(item.text, middle + shift) for shift in (-PASSAGE, 0, PIECE))
                if middle > PASSAGE and begin < cut < end:
                    found[file.domain].append((item.text[begin:cut], item.text[cut:end]))
    return found


def _end_of_word(text: str, place: int) -> int:
    """Return the index of the first whitespace character at this place or after it; -1 if there is none."""
    return next((i for i in range(max(place, 0), len(text)) if text[i].isspace()), -1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
