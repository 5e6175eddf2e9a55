"""`mhmoe chat`: a conversation with a checkpoint in this process, at a terminal or line by line from a pipe."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.generate import load_model, print_piece, read_text
from mhmoe_ray.cli.output import activity_lines, print_note, show_activity

if TYPE_CHECKING:
    from mhmoe_ray.api.model import LoadedModel
    from mhmoe_ray.serving.sampling import SamplingParams

Conversation = list[dict[str, str]]
COMMANDS = "/reset begins a new conversation, /exit or Ctrl-D ends, and Ctrl-C stops an answer"


@options.takes_sampling
def chat(
    sampling: "SamplingParams",
    run: options.RunArg = None,
    system: Annotated[str | None, typer.Option(help="System message, with which each conversation begins.")] = None,
    gpus: options.ModelGpusOption = 0,
    checkpoint: options.CheckpointOption = None,
    storage: options.StorageOption = options.STORAGE,
) -> None:
    """Talk with a checkpoint of a run that was trained on conversations, in this process.

    Each line is a message. /reset begins a new conversation, /exit or Ctrl-D ends, and Ctrl-C stops an answer. For
    example `mhmoe chat chat-tuned --temperature 0.7`.
    """
    show_activity("loading modules")
    from mhmoe_ray.checkpoint.find import split_step
    from mhmoe_ray.errors import ServeError

    beginning = [] if system is None else [{"role": "system", "content": read_text(lambda: system)}]
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    *_, model = load_model(*split_step(run, checkpoint), storage, gpus)
    with model:
        # An answer of one token loads the weights, and checks that the chat template takes the system message.
        model.generate([*beginning, {"role": "user", "content": "?"}], max_tokens=1)
        activity_lines.end()
        messages = beginning
        for line in _input_lines(is_interactive):
            if line == "/exit":
                return
            if line == "/reset":
                messages = beginning
            elif is_interactive and line.startswith("/") and line[1:].isalpha():
                print_note(f"there is no {line}: {COMMANDS}")
            elif line:
                try:
                    prompt = _fit([*messages, {"role": "user", "content": line}], len(beginning), model, sampling)
                    answer = _print_answer(prompt, model, sampling, is_interactive)
                    messages = [*prompt, {"role": "assistant", "content": answer}]
                except ServeError as e:
                    if not is_interactive:
                        raise
                    print_note(f"error: {e}")


def _input_lines(is_interactive: bool) -> Iterator[str]:
    """Yield the lines of standard input, as soon as each is asked for; a terminal has a prompt and a history."""
    if is_interactive:
        # This import gives `input` a history and the keys of a line editor, if Python was built with them.
        with suppress(ImportError):
            import readline  # noqa: F401
        print_note(COMMANDS)
    while True:
        try:
            yield read_text(lambda: input("> " if is_interactive else "")).strip()
        except EOFError:
            # The next line of the terminal is the shell's.
            print(end="\n" if is_interactive else "")
            return
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            print()


def _fit(messages: Conversation, fixed_count: int, model: "LoadedModel", sampling: "SamplingParams") -> Conversation:
    """Return a conversation without its oldest exchanges after `fixed_count` messages, so that an answer fits."""
    answer_tokens = min(sampling.max_tokens, model.seq_len // 4)
    forgotten_count = 0
    while len(messages) > fixed_count + 1 and len(model.encode(messages)) + answer_tokens > model.seq_len:
        messages = [*messages[:fixed_count], *messages[fixed_count + 2 :]]
        forgotten_count += 2
    if forgotten_count:
        print_note(f"the oldest {forgotten_count} messages are left out: the context has {model.seq_len} tokens")
    return messages


def _print_answer(
    messages: Conversation, model: "LoadedModel", sampling: "SamplingParams", is_interactive: bool
) -> str:
    """Print the answer to a conversation as it is generated, and return it; at a terminal, Ctrl-C ends it."""
    pieces = []
    with suppress(KeyboardInterrupt) if is_interactive else nullcontext():
        for piece in model.stream(messages, **sampling.model_dump()):
            pieces.append(piece)
            print_piece(piece)
    print(flush=True)
    if pieces and pieces[-1].finish_reason == "length":
        is_full = pieces[-1].token_count < sampling.max_tokens
        print_note("the answer is cut: " + ("the context is full" if is_full else "--max-tokens allows a longer one"))
    return "".join(piece.text for piece in pieces)
