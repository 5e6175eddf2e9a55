"""Small tasks of lm-eval."""

import json

QUESTIONS = [
    {"question": "the quick", "choices": [" brown", " turns home", " every"], "answer": 0},
    {"question": "a quiet", "choices": [" fox", " night falls on us all and every small boat"], "answer": 0},
    {"question": "the dog sleeps and the fox runs", "choices": [" moon", " over the hill"], "answer": 1},
]
CHOICE_TASK = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write_task(folder, text, questions):
    """Write a task of lm-eval from the template `text` and its questions into a folder, and return the folder."""
    data_path = folder / "questions.jsonl"
    data_path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "task.yaml").write_text(text.format(data=data_path))
    return folder
