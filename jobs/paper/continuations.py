"""Make a multiple-choice task for lm-eval from held-out documents of a run: which of four texts continues a passage?

The three wrong texts are taken from other documents of the same domain.

    python jobs/paper/continuations.py RUN FOLDER
    mhmoe eval RUN --tasks continuations --task-folder FOLDER
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import Document, FileReader, find_files
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
"""Approximate numbers of characters of a passage and of a text that may continue it; both end at the end of a word."""
QUESTIONS_PER_DOMAIN = 80


def main(run: str, folder: Path) -> None:
    """Write questions from the held-out documents of a run, and the lm-eval task that asks them, to `folder`.

    Args:
        run: id, prefix or path of the run.
        folder: folder for the files, created if missing.
    """
    data = find_run(run, Path("runs")).spec().data
    generator, questions = random.Random(0), []
    for domain, pairs in sorted(passages(data).items()):
        generator.shuffle(pairs)
        pieces = sorted({piece for _, piece in pairs})
        if len(pieces) < 4:
            continue
        for passage, piece in pairs[:QUESTIONS_PER_DOMAIN]:
            choices = generator.sample([wrong_piece for wrong_piece in pieces if wrong_piece != piece], 3)
            answer = generator.randrange(4)
            choices.insert(answer, piece)
            questions.append({"domain": domain, "passage": passage, "choices": choices, "answer": answer})
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "questions.jsonl").absolute()
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "continuations.yaml").write_text(TASK.format(questions=json.dumps(str(file))))
    print(f"{len(questions)} questions in {file}")


def passages(data: DataSpec) -> dict[str, list[tuple[str, str]]]:
    """Return pairs of a passage and the text that continues it, by domain.

    Every held-out document that is long enough gives one pair from its middle.
    """
    pairs_by_domain = defaultdict(list)
    for file in find_files(data):
        for item in FileReader(file, data):
            if isinstance(item, Document) and is_validation(item.text, data.validation_fraction):
                middle = len(item.text) // 2
                begin, cut, end = (_end_of_word(item.text, middle + shift) for shift in (-PASSAGE, 0, PIECE))
                if middle > PASSAGE and begin < cut < end:
                    pairs_by_domain[file.domain].append((item.text[begin:cut], item.text[cut:end]))
    return pairs_by_domain


def _end_of_word(text: str, position: int) -> int:
    """Return the index of the first whitespace character at `position` or after it; -1 if there is none."""
    return next((i for i in range(max(position, 0), len(text)) if text[i].isspace()), -1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
