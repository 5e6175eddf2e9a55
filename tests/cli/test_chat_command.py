"""Tests of `mhmoe chat`, a conversation with a checkpoint in the command's own process."""

import os
import signal
import subprocess

import pexpect
import pytest

import mhmoe_ray as mh
from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE
from mhmoe_ray.errors import ServeError
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import assert_one_line, command, mhmoe

SEQ_LEN = 4096
REFUSAL = '{%- for message in messages if message.content == "refuse" %}{{ raise_exception("refused") }}{% endfor -%}'
OPTIONS = ("--temperature", "0", "--ignore-eos", "--max-tokens")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with a run that has the built-in chat template, with one message that it refuses."""
    folder = tmp_path_factory.mktemp("project")
    make_run(folder, MIXTRAL, SEQ_LEN).chat_template_file.write_text(REFUSAL + BUILT_IN_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def answer_to(project):
    """Yield a function that returns the model's answer of 8 tokens to messages of the user and its own answers."""
    with mh.load("tiny", storage=project / "runs") as model:

        def answer(*contents, system=None):
            messages = [{"role": "system", "content": system}] if system else []
            roles = ("user", "assistant") * len(contents)
            messages += [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
            return model.generate(messages, max_tokens=8, temperature=0, ignore_eos=True).text

        yield answer


def chat(folder, lines, *words):
    """Run `mhmoe chat` with lines from a pipe, assert that it succeeds, and return what it prints on both streams."""
    process = subprocess.run(
        [*command("chat"), *OPTIONS, "8", *words], cwd=folder, input=lines.encode(), capture_output=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.decode(), process.stderr.decode()


def test_lines_of_a_pipe_are_messages_of_conversations(project, answer_to):
    out, _ = chat(project, "the fox\n\n the dog \n/reset\nthe dog\n/exit\nthe fox\n", "--system", "the hill")
    first_answer = answer_to("the fox", system="the hill")
    second_answer = answer_to("the fox", first_answer, "the dog", system="the hill")
    new_answer = answer_to("the dog", system="the hill")
    assert out == f"{first_answer}\n{second_answer}\n{new_answer}\n"
    assert len({first_answer, second_answer, new_answer, answer_to("the dog")}) == 4


def test_pipe_gets_an_answer_before_it_sends_the_next_line(project):
    words = [*command("chat", "tiny@7"), *OPTIONS, "2"]
    with subprocess.Popen(words, cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for _ in range(2):
            process.stdin.write(b"the fox\n")
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.close()
        assert process.wait(60) == 0


def test_oldest_messages_are_left_out_when_the_context_is_full(tmp_path, answer_to):
    make_run(tmp_path, MIXTRAL, 64).chat_template_file.write_text(BUILT_IN_TEMPLATE)
    message = "the quick brown fox jumps over the lazy dog"
    out, err = chat(tmp_path, f"the fox\n{message}\n{message}\n")
    assert "messages are left out: the context has 64 tokens" in err
    assert out.endswith(f"\n{answer_to(message)}\n")


def test_terminal_has_a_history_and_stops_an_answer_by_ctrl_c(project):
    words = [*command("chat"), *OPTIONS, "4000"]
    terminal = pexpect.spawn(
        words[0],
        words[1:],
        cwd=project,
        env={**os.environ, "TERM": "xterm"},
        encoding="utf-8",
        codec_errors="replace",
        timeout=120,
        # Tests that run in the background ignore SIGINT, and the child would inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    terminal.expect_exact("Ctrl-C stops an answer\r\n")
    for line in ("one fox", "the dog"):
        terminal.expect_exact("> ")
        terminal.sendline(line)
        terminal.expect_exact(f"{line}\r\n")
        terminal.expect(r"\S")
        terminal.sendintr()
    terminal.expect_exact("> ")
    assert "the answer is cut" not in terminal.before
    terminal.send("\x1b[A\x1b[A")
    terminal.expect_exact("one fox")
    terminal.sendintr()
    terminal.expect_exact("> ")
    terminal.sendline("/quit")
    terminal.expect_exact("there is no /quit: /reset begins a new conversation")
    terminal.expect_exact("> ")
    terminal.sendline("/reset")
    terminal.expect_exact("> ")
    terminal.sendline("refuse")
    terminal.expect_exact("error: the messages: refused")
    # The refused message is no part of the conversation.
    terminal.expect_exact("> ")
    terminal.sendline("the dog")
    terminal.expect_exact("the dog\r\n")
    terminal.expect(r"\S")
    terminal.sendintr()
    terminal.expect_exact("> ")
    assert "error" not in terminal.before
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_mistakes_are_one_line(project, tmp_path):
    run = make_run(tmp_path, MIXTRAL)
    no_template = mhmoe(tmp_path, "chat")
    assert_one_line(no_template, ServeError.exit_code, "it has no chat template", "`mhmoe generate`", "jobs/chat.yaml")
    run.chat_template_file.write_text("{{ raise_exception('no system here') if messages[0].role == 'system' }}a")
    system_result = mhmoe(tmp_path, "chat", "--system", "be brief")
    assert_one_line(system_result, ServeError.exit_code, "the messages: no system here")
    for text, reason in ((b"the \xe9\n", "it is not UTF-8"), (b"the fox " * SEQ_LEN, "the prompt: it has ")):
        process = subprocess.run(command("chat"), cwd=project, input=text, capture_output=True)
        [line] = process.stderr.decode().splitlines()
        assert (process.returncode, line.startswith("error: "), reason in line) == (ServeError.exit_code, True, True)
