"""Questions to both compared trees without a Ray cluster: help, plans, presets, files for clusters, users' mistakes."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.equality import reading
from tests.equality.normal import Normaliser
from tests.equality.side import CommandError, Side

Question = tuple[str, Callable[[], Any]]
"""The name of an observation, and the function that returns its value."""

MISTAKES: dict[str, list[str]] = {
    "an unknown key": ["plan", "spec.yaml", "--set", "train.step=5"],
    "a missing spec": ["submit", "nowhere.yaml"],
    "a missing source": ["submit", "spec.yaml", "--set", "data.sources.web.path=nowhere", "--set", "data.prepared=x"],
    "an unknown run": ["status", "tiny-123456"],
    "an unknown run to serve": ["serve", "deploy", "tiny-123456"],
    "an unknown run to remove": ["rm", "tiny-123456"],
    "an unknown run to export": ["ckpt", "export", "--to", "out", "tiny-123456"],
    "no run at all": ["generate", "--prompt", "x"],
    "an address with a wrong key": ["list", "--storage", "s3://bucket/runs?regoin=eu"],
    "an address where nothing listens": ["submit", "spec.yaml", "--address", "http://127.0.0.1:1"],
    "an address that is none": ["cluster", "status", "--address", "auto"],
    "an odd number of workers": ["plan", "spec.yaml", "--set", "cluster.workers=3"],
    "expert parallelism of a dense model": ["plan", "spec.yaml", "--set", "cluster={workers: 2, ep: 2}"],
    "a kernel that needs CUDA": ["plan", "spec.yaml", "--set", "model.moe={d_expert: 8, kernel: triton}"],
    "half of a cluster on paper": ["plan", "spec.yaml", "--nodes", "4"],
    "an unknown option": ["plan", "spec.yaml", "--bad"],
    "an unknown command": ["nonsense"],
    "an unknown preset": ["presets", "nonsense"],
    "a malformed override": ["plan", "spec.yaml", "--set", "train.steps"],
    "a sweep that is none": ["sweep", "spec.yaml", "--dry-run"],
    "a folder that is no export": ["ckpt", "import", "text"],
    "a mixture of data that is not prepared": ["data", "mix", "spec.yaml"],
    "text that is not there": ["data", "lint", "nowhere"],
    "no cluster": ["serve", "status"],
    "a cluster to forget": ["cluster", "forget", "nonsense"],
}

PLANS: dict[str, list[str]] = {
    "quickstart": ["jobs/quickstart.yaml"],
    "families": ["jobs/families.yaml"],
    "multilingual": ["jobs/multilingual.yaml"],
    "p1": ["jobs/paper/p1.yaml"],
    "p2": ["jobs/paper/p2.yaml"],
    "trillion on paper": ["jobs/scale/trillion.yaml", "--nodes", "128", "--gpus", "8"],
}
"""Arguments of `mhmoe plan`, by the name of the plan; the first argument is the path of a spec in the tree."""

ON_SITE = {
    "cluster.shared_filesystem": "true",
    "storage": "/mnt/mhmoe/runs",
    "data.prepared": "/mnt/mhmoe/prepared",
    "data.sources.web.path": "/mnt/mhmoe/web",
    "data.sources.books.path": "/mnt/mhmoe/books",
}
"""Keys that put the paths of a spec into the storage that the nodes of `cluster/site.yaml` share."""

SWEEPS = ("first-paper", "follow-up", "heads", "top-k", "experts", "projections")


def questions(side: Side, normal: Normaliser) -> Iterator[Question]:
    """Yield all questions that need no cluster, no prepared data and no run."""
    tree = side.tree
    yield "help", lambda: {" ".join(["mhmoe", *command]): text for command, text in _helps(side, [])}
    yield "version", lambda: side.text("--version")
    yield "presets", lambda: side.text("presets")
    yield "presets --json", lambda: side.json("presets", "--json")
    for name, (file, *other_words) in PLANS.items():
        words = ["plan", str(tree / file), *other_words]
        yield f"plan of {name}", lambda words=words: normal.text(side.text(*words))
        yield f"plan --json of {name}", lambda words=words: normal.value(side.json(*words, "--json"))
    for name in SWEEPS:
        words = ["sweep", str(tree / "jobs" / "paper" / f"{name}.yaml"), "--dry-run"]
        yield f"sweep --dry-run of {name}", lambda words=words: normal.text(side.text(*words))
    yield "sweep --dry-run --json", lambda: normal.value(side.json("sweep", "sweep.yaml", "--dry-run", "--json"))
    yield "submit --dry-run", lambda: normal.value(side.json("submit", "spec.yaml", "--dry-run"))
    unreachable_submit = ["submit", "spec.yaml", "--dry-run", "--address", "http://127.0.0.1:1"]
    yield "submit --dry-run for another cluster", lambda: normal.value(side.json(*unreachable_submit))
    yield "cluster render", lambda: _rendered_files(side, normal, "rendered")
    run = [word for key, value in ON_SITE.items() for word in ("--set", f"{key}={value}")]
    yield "cluster render --run", lambda: _rendered_files(side, normal, "rendered-run", "--run", "spec.yaml", *run)
    for name, words in MISTAKES.items():
        yield f"mistake: {name}", lambda words=words: mistake(side, normal, words)


def mistake(side: Side, normal: Normaliser, words: list[str]) -> dict[str, Any]:
    """Run a command that must fail, and return its exit code and output, normalised.

    Raises:
        CommandError: The command succeeds.
    """
    answer = side.ask(*words)
    if answer.code == 0:
        raise CommandError(f"mhmoe {' '.join(words)} should fail\n{answer.out}{answer.err}")
    return {"exit code": answer.code, "out": normal.text(answer.out), "err": normal.text(answer.err)}


def _helps(side: Side, command: list[str]) -> Iterator[tuple[list[str], str]]:
    """Yield a command and its help text, then the same for all of its subcommands, recursively."""
    text = side.text(*command, "--help")
    yield command, text
    _, _, command_table = text.partition("\nCommands:\n")
    for name in re.findall(r"^  (\w[\w-]*)(?:  |$)", command_table, re.MULTILINE):
        yield from _helps(side, [*command, name])


def _rendered_files(side: Side, normal: Normaliser, target_folder: str, *options: str) -> Any:
    """Run `mhmoe cluster render` for the tree's cluster/site.yaml; return its output and written files, normalised."""
    output = side.text("cluster", "render", str(side.tree / "cluster" / "site.yaml"), "--into", target_folder, *options)
    return {"said": normal.text(output), **normal.value(reading.contents(side.project / target_folder))}
