"""All questions (commands and HTTP requests) that the comparison asks one of its two sides, in order."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.equality import commands, reading, specs
from tests.equality.commands import Question
from tests.equality.normal import Normaliser
from tests.equality.side import CommandError, Side

Observations = dict[str, Any]
"""Observations of a side, as JSON values by the names of their questions."""
CONCURRENT_QUESTIONS = 3
SERVED = "heads-2"
SERVED_BESIDE = "first-paper"
EXPORTED = ("sparse", "heads-2", "first-paper")
EVALUATED = "heads-2"
PROMPTS = ("a", "der mond", "1 2 3 ä")


def walk(side: Side, models: list[str], port: int, say: Callable[[str], None]) -> Observations:
    """Ask a side all questions, from preparing text to serving, and return its answers, the observations.

    Args:
        side: The side, whose project folder is empty.
        models: The names of the models to train, in `specs.MODELS`.
        port: The port that models are served at.
        say: Function that is called with a line of progress before each stage, such as training.

    Raises:
        CommandError: A command failed that must succeed.
    """
    normal, observations = Normaliser(side.folder), Observations()
    specs.write_project(side.project, models)
    say("commands that need no cluster")
    observations |= _answers(commands.questions(side, normal))
    say("starting a cluster")
    with side.cluster():
        say("preparing text")
        observations |= _answers(_preparations(side, normal))
        say(f"training {len(models) * len(specs.PRECISIONS)} runs")
        observations["sweep --json"] = normal.value(side.json("sweep", "sweep.yaml", "--json"))
        runs = _runs(side, models)
        for name, run in runs.items():
            observations |= _run_observations(name, run, normal)
        # `mhmoe status` also says whether a server of the run is up, so all statuses are asked before anything is
        # served.
        observations |= _answers(_statuses(side, normal, runs))
        say("evaluating, exporting, serving")
        observations |= _answers(_questions_about_runs(side, normal, runs, port))
        say("stopping")
    return observations


def _answers(questions: Iterable[Question]) -> Observations:
    """Ask all questions, `CONCURRENT_QUESTIONS` at a time, and return each answer by the name of its question."""
    with ThreadPoolExecutor(CONCURRENT_QUESTIONS) as pool:
        pending_answers = {name: pool.submit(find) for name, find in questions}
        return {name: answer.result() for name, answer in pending_answers.items()}


def _preparations(side: Side, normal: Normaliser) -> Iterator[Question]:
    """Yield the questions about raw and prepared text, of which the first ones prepare the text."""
    for file, folder in (("spec.yaml", "prepared"), ("best-fit.yaml", specs.BEST_FIT["prepared"])):

        def prepared(file: str = file, folder: str = folder) -> Any:
            report = side.json("data", "prepare", file, "--json")
            mixture = side.json("data", "mix", file, "--json")
            files = reading.contents(side.project / folder)
            return normal.value({"said": report, "mixture": mixture, **files})

        yield f"shards of {folder}", prepared
    yield "data inspect --json", lambda: normal.value(side.json("data", "inspect", "text/web", "--json"))
    lint = ["data", "lint", "text/web", "--json"]
    yield "data lint --json", lambda: _exit_code_and_json(side, normal, lint)


def _exit_code_and_json(side: Side, normal: Normaliser, words: list[str]) -> Any:
    """Run a command that may fail, and return its exit code and the JSON that it prints."""
    answer = side.ask(*words)
    return {"exit code": answer.code, "json": normal.value(json.loads(answer.out))}


def _runs(side: Side, models: list[str]) -> dict[str, Path]:
    """Return the run directories of the sweep that `side` has started, by the names of their variants.

    Raises:
        CommandError: A run has not finished.
    """
    runs = {}
    for model in models:
        for precision in specs.PRECISIONS:
            [run] = (side.project / "runs").glob(f"{specs.run_name(model, precision)}-??????")
            last_event = reading.json_lines(run / "events.jsonl")[-1]
            if last_event["event"] != "finished":
                raise CommandError(f"run {run.name} ended with {last_event}")
            runs[specs.variant(model, precision)] = run
    return runs


def _run_observations(name: str, run: Path, normal: Normaliser) -> Observations:
    """Return the observations of the files in a run directory; `name` is part of their names."""
    observations = {f"metrics of {name}": normal.value(reading.json_lines(run / "metrics.jsonl"))}
    # The checkpoints are in the order of steps. The first moments in the first one are (1 - beta1) times the gradients
    # of step 1, so a difference in a backward pass shows there first.
    for part in ("weights", "optim"):
        folders = sorted((run / "checkpoints").iterdir())
        observations[f"{part} of {name}"] = {folder.name: reading.contents(folder / part) for folder in folders}
    manifests = {path.parent.name: json.loads(path.read_text()) for path in (run / "checkpoints").glob("*/*.json")}
    observations[f"manifests of {name}"] = normal.value(dict(sorted(manifests.items())))
    observations[f"events of {name}"] = normal.value(reading.json_lines(run / "events.jsonl"))
    observations[f"routes of {name}"] = reading.contents(run / "routing")
    observations[f"spec of {name}"] = normal.text((run / "spec.yaml").read_text())
    observations[f"names of files of {name}"] = sorted(path.name for path in run.iterdir())
    return observations


def _statuses(side: Side, normal: Normaliser, runs: dict[str, Path]) -> Iterator[Question]:
    """Yield the question what the status of each finished run is."""
    for name, run in runs.items():
        yield f"status --json of {name}", lambda run=run: normal.value(side.json("status", run.name, "--json"))


def _questions_about_runs(side: Side, normal: Normaliser, runs: dict[str, Path], port: int) -> Iterator[Question]:
    """Yield the questions about finished runs.

    Args:
        side: The side that has trained the runs.
        normal: The normaliser of the side.
        runs: The run directories by variant.
        port: The port that models are served at.
    """

    def question(*words: str) -> Callable[[], Any]:
        return lambda: normal.value(side.json(*words, "--json"))

    names = {name: run.name for name, run in runs.items()}
    served = [names[v] for m in (SERVED, SERVED_BESIDE) if (v := specs.variant(m, "float32")) in names]
    # Serving takes longest, so it is started first, and the other questions are asked while it goes on.
    if served:
        yield "answers over HTTP", lambda: _served(side, normal, served, port)
    if evaluated := names.get(specs.variant(EVALUATED, "bfloat16")):
        yield "eval --json", question("eval", evaluated, "--text", "text/web")
    if evaluated := names.get(specs.variant(EVALUATED, "float32")):
        yield "routing --json", question("routing", evaluated)
    for model in EXPORTED:
        if run := names.get(specs.variant(model, "float32")):
            yield f"export of {model}", lambda model=model, run=run: _exported(side, normal, model, run)
    name, run = next(iter(names.items()))
    yield f"ckpt inspect of {name}", lambda: normal.text(side.text("ckpt", "inspect", run))
    yield f"ckpt inspect --json of {name}", question("ckpt", "inspect", run)
    yield f"ckpt verify --json of {name}", question("ckpt", "verify", run)
    list_command = ["list", "equal-", "--json"]
    yield "list --json", lambda: _by_run(normal.value(side.json(*list_command)))
    for mistake, words in {
        "a finished run to resume": ["resume", run],
        "a finished run to stop": ["stop", run],
        "a changed run to resume": ["resume", run, "--set", "train.steps=20"],
        "data of another recipe": ["data", "prepare", "spec.yaml", "--set", "data.seq_len=16"],
        "a checkpoint that is not there": ["generate", run, "--prompt", "x", "--checkpoint", "step_00000077.1"],
    }.items():
        yield f"mistake: {mistake}", lambda words=words: commands.mistake(side, normal, words)


def _by_run(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `mhmoe list` in the order of the runs' names."""
    # Runs of a sweep start at the same time, so their order in the output may vary.
    return sorted(rows, key=lambda row: str(row["run"]))


def _exported(side: Side, normal: Normaliser, model: str, run: str) -> Any:
    """Export a run and import the export; return the exported files, the commands' output and a generated text."""
    folder = f"export-{model}"
    outputs = [side.text("ckpt", "export", run, "--to", folder)]
    imported = side.text("ckpt", "import", folder, "--name", f"back-{model}", "--seq-len", "32")
    imported_run = imported.split()[-1]
    words = ["generate", imported_run, "--prompt", PROMPTS[0], "--temperature", "0", "--max-tokens", "12", "--json"]
    observations = {
        "said": [*outputs, imported],
        "generated": side.json(*words),
        "status": side.json("status", imported_run, "--json"),
    }
    return normal.value({**observations, **reading.contents(side.project / folder)})


def _served(side: Side, normal: Normaliser, runs: list[str], port: int) -> Any:
    """Serve one or two runs at the same time, the first at / and the second at /beside; return all HTTP answers."""
    observations: dict[str, Any] = {}
    names = ("mhmoe", "beside")[: len(runs)]
    for run, name in zip(runs, names, strict=True):
        output = side.text("serve", "deploy", run, "--name", name, "--set", f"serve.port={port}")
        url = f"http://127.0.0.1:{port}" + ("" if name == "mhmoe" else f"/{name}")
        answers: dict[str, Any] = {"said": output}
        for path in ("/openapi.json", "/health", "/ready", "/v1/models", "/tokenizer_info"):
            answers[path] = _http(url + path)
        for prompt in PROMPTS:
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 5, "echo": True}
            answers[f"greedy {prompt}"] = _http(f"{url}/v1/completions", body)
            sampled_request = {"prompt": prompt, "max_tokens": 12, "seed": 7, "top_p": 0.9, "n": 2}
            answers[f"drawn {prompt}"] = _http(f"{url}/v1/completions", sampled_request)
        chat_request = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 6, "temperature": 0}
        answers["chat"] = _http(f"{url}/v1/chat/completions", chat_request)
        answers["tokens"] = _http(f"{url}/tokenize", {"prompt": PROMPTS[-1]})
        answers["an unknown field"] = _http(f"{url}/v1/completions", {"prompt": "a", "nonsense": 1})
        answers["a temperature out of range"] = _http(f"{url}/v1/completions", {"prompt": "a", "temperature": 3})
        answers["another model"] = _http(f"{url}/v1/completions", {"prompt": "a", "model": "nonsense"})
        answers["no such path"] = _http(f"{url}/v1/nonsense")
        observations[name] = answers
    observations["serve status --json"] = side.json("serve", "status", "--json")
    observations["serve down"] = [side.text("serve", "down", name) for name in reversed(names)]
    return normal.value(observations)


def _http(url: str, body: Any = None) -> Any:
    """Send a GET request, or a POST request with a JSON body; return the status and the JSON or text of the answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return {"status": status, "body": json.loads(text)}
    except ValueError:
        return {"status": status, "body": text}
