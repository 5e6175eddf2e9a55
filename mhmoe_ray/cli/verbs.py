"""Hints for unknown commands: suggest the intended command, by its name in other tools or by a similar spelling."""

import difflib
import re
from itertools import pairwise
from typing import Any

from typer.core import TyperGroup

_SYNONYMS: dict[str, str] = {
    "submit": "train fit run launch start pretrain finetune sbatch qsub accelerate torchrun",
    "status": "info show describe get state watch top progress",
    "list": "ls ps runs jobs history",
    "logs": "log tail console",
    "stop": "kill cancel terminate end abort scancel",
    "resume": "continue restart retry",
    "rm": "delete remove del purge",
    "generate": "infer inference predict complete sample",
    "chat": "talk ask converse repl",
    "eval": "evaluate test lm-eval lm_eval score validate",
    "routing": "routes experts router",
    "report": "compare plot html",
    "track": "sync wandb mlflow",
    "sweep": "tune grid search hpo",
    "bench": "benchmark perf",
    "profile": "trace profiler flamegraph nsys",
    "plan": "estimate cost config resolve dry-run memory",
    "schema": "jsonschema json-schema keys options",
    "presets": "models init new template zoo",
    "doctor": "check diagnose env",
    "data prepare": "prepare tokenize tokenise preprocess pack",
    "data inspect": "inspect",
    "data sample": "download fetch dataset datasets",
    "data lint": "lint",
    "ckpt export": "export convert push upload save",
    "ckpt import": "import load from-hf from_hf",
    "ckpt inspect": "checkpoint checkpoints",
    "serve deploy": "deploy server api serve-model",
    "cluster up": "up init-cluster ray",
    "cluster down": "down shutdown teardown",
    "cluster dashboard": "dashboard browser ui",
    "cluster use": "use connect login attach",
    "cluster render": "render kuberay slurm k8s kubernetes",
}  # fmt: skip
_COMMAND_BY_SYNONYM = {name: command for command, names in _SYNONYMS.items() for name in names.split()}


_OVERRIDE = re.compile(r"(?:--)?([a-z_]+(?:\.\w+)+=.*)", re.DOTALL)


class SuggestingGroup(TyperGroup):
    """A group of commands that answers an unknown command with the intended one, or with a list of all commands.

    Overrides without `--set`, as in Hydra, and those without an equals sign are answered with the right form.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        command = self.get_command(ctx, name)
        if command and any("--set" in parameter.opts for parameter in command.params):
            for first_arg, arg in pairwise(args):
                if not first_arg.startswith("-") and (match := _OVERRIDE.fullmatch(arg)):
                    ctx.fail(f"a key of the spec needs the option --set: write --set {match[1]}")
            for option, key, value in zip(args, args[1:], args[2:], strict=False):
                if option == "--set" and "=" not in key and not value.startswith("-"):
                    ctx.fail(f"an override is one argument: write --set {key}={value}")
        # click has an error of its own for an unknown option.
        if not name.startswith("-") and command is None:
            ctx.fail(f"there is no command {name!r}{self._hint(ctx, name.lower())}")
        return super().resolve_command(ctx, args)

    def _hint(self, ctx: Any, name: str) -> str:
        # This import loads pydantic, which is needed only to suggest a command here.
        from mhmoe_ray.spec.hints import MIN_SIMILARITY

        command = _COMMAND_BY_SYNONYM.get(name)
        path: list[str] = []
        # The path holds the names of all groups except the outermost, `mhmoe`.
        context = ctx
        while context.parent is not None:
            path, context = [context.info_name, *path], context.parent
        # Within `mhmoe data`, a hint at `mhmoe serve deploy` would mislead.
        if command and path == command.split()[: len(path)]:
            return f"; did you mean `mhmoe {command}`?"
        if similar_names := difflib.get_close_matches(name, self.list_commands(ctx), n=1, cutoff=MIN_SIMILARITY):
            return f"; did you mean `{' '.join(['mhmoe', *path, similar_names[0]])}`?"
        return f"; there are {', '.join(self.list_commands(ctx))}"
