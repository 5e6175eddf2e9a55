import hypothesis.strategies as st
import lxml.html
import pytest
from hypothesis import given

from mhmoe_ray.corpus.readers import (
    HTML,
    is_worth_reading,
    page_reader,
    question_reader,
    read_blocks,
    read_code,
    read_dictionary,
    read_mallard,
)
from mhmoe_ray.errors import DataError

PAGE = """<!DOCTYPE html><html><head><title>2.1. Ports</title><style>p {}</style></head><body>
<div id="nav">Home | Next</div>
<div id="text"><h1>Binding  to
 ports<a class="link">#</a></h1><!-- no text -->
<p>Both <code>80</code> and&nbsp;<b>443</b> work.<br>Others too.</p><script>x()</script>
<ul><li>one</li><li><p>two</p>and more</li></ul>
<pre>if a:
    b()

c()
</pre><table><tr><th>Name</th><td>é</td></tr></table><user@example.com>mail</div>
<div>Footer</div></body></html>"""


def test_page_reader_yields_the_paragraphs_of_a_page():
    (document,) = page_reader("//*[@id='text']", "//a[@class='link']")(PAGE.encode())
    assert document.title == "Ports"
    assert document.paragraphs == [
        "Binding to ports",
        "Both 80 and 443 work.",
        "Others too.",
        "one",
        "two",
        "and more",
        "if a:\n    b()\n\nc()",
        "Name é",
        "mail",
    ]


def test_page_reader_skips_a_page_without_content():
    assert list(page_reader("//*[@id='else']")(PAGE.encode())) == []
    assert list(page_reader("//body")(b"")) == []


def test_page_reader_uses_the_declared_encoding():
    page = '<html><head><meta charset="iso-8859-1"></head><body>Stra\xdfe</body></html>'.encode("latin-1")
    (document,) = page_reader("//body")(page)
    assert document.paragraphs == ["Straße"]


@given(st.recursive(st.text("ab "), lambda inner: st.lists(inner, max_size=4) | st.tuples(inner), max_leaves=40))
def test_read_blocks_keeps_all_text_of_nested_elements(tree):
    def markup(node) -> str:
        if isinstance(node, str):
            return node
        name = "p" if isinstance(node, list) and len(node) % 2 else "div" if isinstance(node, list) else "b"
        return f"<{name}>{''.join(map(markup, node))}tail</{name}>"

    root = lxml.html.fragment_fromstring(f"<div>{markup(tree)}</div>")
    block_text = "".join(block.text for block in read_blocks(root, HTML))
    assert block_text.replace(" ", "") == root.text_content().replace(" ", "")


def test_page_reader_reads_deeply_nested_elements():
    (document,) = page_reader("//body")(b"<html><body>" + b"<i>" * 200 + b"deep" + b"</i>" * 200 + b"</body></html>")
    assert document.paragraphs == ["deep"]


def test_question_reader_makes_questions_of_headings():
    page = "<html><head><title>Why?</title></head><body><p>Because.</p><h2>B.2 What is it?</h2><p>This.</p><p>That.</p>"
    page += "<h2>About</h2><p>Nothing.</p><h3>Unanswered?</h3></body></html>"
    assert [d.paragraphs for d in question_reader("//body")(page.encode())] == [
        ["Q: Why?", "A: Because."],
        ["Q: What is it?", "A: This.", "That."],
    ]


def test_read_mallard_yields_the_page():
    page = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>About</desc><credit><name>N</name></credit></info>
    <title>Tasten</title><p>Ein <em>Wort</em> <gui>Start</gui>,
       dann.</p><steps><item><p>Eins</p></item></steps><screen>$ ls
  -l</screen><links type="topic"/></page>"""
    (document,) = read_mallard(page.encode())
    assert document.title == "Tasten"
    assert document.paragraphs == ["Tasten", "Ein Wort Start, dann.", "Eins", "$ ls\n  -l"]
    with pytest.raises(DataError, match="not XML"):
        list(read_mallard(page.removesuffix("</page>").encode()))


def test_read_code_removes_only_the_licence_notice():
    body = "\n".join(f"int add_{i}(int a) {{ return a + {i}; }}" for i in range(20))
    for notice in (
        "/* Copyright A\n * Licence B */\n",
        "// Copyright A\n// more\n\n",
        "# SPDX-License-Identifier: MIT\n",
    ):
        assert [d.paragraphs for d in read_code((notice + body).encode())] == [[body]]
    (document,) = read_code(f"/* Adds. */\n{body}".encode())
    assert document.paragraphs[0].startswith("/* Adds. */")


def test_read_code_drops_binary_and_generated_files():
    assert list(read_code(b"\xff\xfe" * 200)) == []
    assert is_worth_reading("a = 1\n" * 50)
    for text in ("a = 1\n", "x" * 1001 + "\na" * 50, ("x" * 101 + "\n") * 5, "+-*/()\n" * 50):
        assert not is_worth_reading(text)


def test_read_dictionary_yields_its_entries():
    text = "00-database-info\n   About it.\n\nword\n\n   <kind> A {unit} of\n   text.\n\n   (2001-02-03)\n\n"
    text += "zebra\n\n   Striped.\n"
    assert [d.paragraphs for d in read_dictionary(text.encode())] == [
        ["word", "<kind> A unit of text."],
        ["zebra", "Striped."],
    ]
