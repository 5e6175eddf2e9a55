"""Tests that chat templates of others end in bounded time and memory."""

import multiprocessing
import resource

import pytest

from mhmoe_ray.data.chat import process
from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import EXCHANGES, ChatTemplate
from tests.fuzz.mutants import BAD_TEMPLATES


def render_within_limits(results) -> None:
    """Put the error or the text of each bad template into a queue, from a process that may not take much itself."""
    resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29))
    for template in BAD_TEMPLATES:
        try:
            results.put(ChatTemplate(template, "<s>", "</s>").render(EXCHANGES))
        except ChatTemplateError as e:
            results.put(e)


@pytest.mark.long
def test_bad_templates_end_in_an_error():
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=render_within_limits, args=(results,))
    process.start()
    errors = [results.get(timeout=300) for _ in BAD_TEMPLATES]
    process.join()
    for error in errors:
        assert isinstance(error, ChatTemplateError)
        assert "\n" not in str(error)
        assert len(str(error)) <= 1000


def test_template_works_again_after_a_rendering_was_ended():
    template = ChatTemplate("{% set n = messages | length %}{% if n > 1 %}{{ n ** (10 ** 10) }}{% endif %}ok", "", "")
    with pytest.raises(ChatTemplateError, match="it takes more than 2 s"):
        template.render(EXCHANGES)
    assert template.render(EXCHANGES[:1]) == "ok"


def put_process_id(results) -> None:
    """Put the id of the process that renders for this one into a queue."""
    assert ChatTemplate("ok", "", "").render(EXCHANGES) == "ok"
    results.put(process._start_process()[0].pid)


def test_a_forked_process_renders_in_a_process_of_its_own():
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    put_process_id(results)
    child = context.Process(target=put_process_id, args=(results,))
    child.start()
    assert results.get(timeout=60) != results.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert ChatTemplate("ok", "", "").render(EXCHANGES) == "ok"
