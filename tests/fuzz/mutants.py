"""Mutants of files: small damages that accidents and attackers do to text, trees of values and bytes."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

BAD_VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "a\nb",
    "\x1b]0;title\x07", "\x00", "\ud800", "x" * 100_000, "../../etc/passwd", "/dev/zero", "s3://", "hf:", "auto",
    "1e9", [], {}, [[]], [None], {"a": None}, {"": ""}, ["a", "a"], [-1], [1e400],
]  # fmt: skip
"""Values of every type, at the edges of what a field may hold."""
BAD_TEXTS = [
    "2026-13-45", "!!int abc", "9" * 6000, "[" * 3000, "{a: " * 500, "&a [*a]", "<<: 1", "? [1]\n: 2", "\t", "=", "~",
    "!!python/name:os.system", "---\n---\n", "%YAML 9.9", "\ufeff", "\x00", "\x1b[31m", "'", "*unknown", "0x",
    "1_000__0", "!!binary %%%",
]  # fmt: skip
"""Texts that parsers read in unexpected ways."""
BAD_TEMPLATES = [
    "{{ 'a' * 3000000000 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%1000000000d' | format(1) }}", "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a'.ljust(messages | length * 10 ** 9) }}", "{{ '{:1000000000}'.format(messages | length) }}",
    "{{ 10 ** (10 ** 10) }}", "{{ (messages | length + 9) ** (10 ** 10) }}", "{{ lipsum(n=10 ** 7) }}",
    "{{ (range(99999) | list * 99999) | length }}", "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "{{ 'a' * 99999999 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "[" * 3000, "{% if 1 %}" * 300,
    "{{ raise_exception('a' * 99999999) }}",
]  # fmt: skip
"""Chat templates that take too much time or memory, or make too much text."""
BAD_BYTES = [
    b"",
    b"\x00",
    b"\xff" * 8,
    b"\x80",
    b"\xed\xa0\x80",
    b"\x7f" * 8,
    b"PK\x03\x04",
    b"\x1f\x8b\x08\x00",
    b"{" * 5000,
]


def mutated_file(path: Path, chooser: random.Random) -> None:
    """Damage a file in place; now and then it becomes a folder, a pipe, a loop of links, or disappears."""
    if chooser.random() < 0.02:
        path.unlink()
        chooser.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: None])()
        return
    content = path.read_bytes()
    mutate = _TEXT_MUTATIONS.get(path.suffix, _mutated_bytes)
    if chooser.random() < 0.2:
        mutate = _mutated_bytes
    path.write_bytes(mutate(content, chooser))


def mutated_tree(tree: Any, chooser: random.Random) -> Any:
    """Return a tree of JSON values with one value replaced, removed, added or moved."""
    tree_slots = list(_tree_slots(tree))
    if not tree_slots:
        return chooser.choice(BAD_VALUES)
    container, key = chooser.choice(tree_slots)
    action = chooser.random()
    if action < 0.75:
        container[key] = chooser.choice(BAD_VALUES)
    elif action < 0.85:
        del container[key]
    elif isinstance(container, dict):
        container[str(chooser.choice(BAD_VALUES))] = container[key]
    else:
        container.append(container[chooser.randrange(len(container))])
    return tree


def _tree_slots(tree: Any) -> list[tuple[Any, Any]]:
    """Return every slot for a value in a tree, as its container and its key there."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [slot for key, value in items for slot in [(tree, key), *_tree_slots(value)]]


def _mutated_yaml(content: bytes, chooser: random.Random) -> bytes:
    if chooser.random() < 0.6:
        tree = mutated_tree(yaml.safe_load(content), chooser)
        return yaml.safe_dump(tree, sort_keys=False).encode(errors="surrogatepass")
    return _mutated_text(content, chooser)


def _mutated_json(content: bytes, chooser: random.Random) -> bytes:
    if chooser.random() < 0.7:
        return json.dumps(mutated_tree(json.loads(content), chooser)).encode(errors="surrogatepass")
    return _mutated_text(content, chooser)


def _mutated_lines(content: bytes, chooser: random.Random) -> bytes:
    """Return JSON lines with a damage in one line."""
    lines = content.splitlines(keepends=True)
    index = chooser.randrange(len(lines))
    lines[index] = _mutated_json(lines[index], chooser) + b"\n"
    return b"".join(lines)


def _mutated_template(content: bytes, chooser: random.Random) -> bytes:
    """Return a chat template with a bad template behind it, or with a bad piece."""
    if chooser.random() < 0.3:
        return content + chooser.choice(BAD_TEMPLATES).encode()
    return _mutated_text(content, chooser)


def _mutated_text(content: bytes, chooser: random.Random) -> bytes:
    """Return text with a bad piece in place of a value, or between two characters."""
    text = content.decode()
    piece = chooser.choice(BAD_TEXTS)
    ends = [i + 1 for i, character in enumerate(text) if character in ":,[ \n"] or [0]
    start = chooser.choice(ends)
    stop = start if chooser.random() < 0.5 else chooser.choice([end for end in ends if end >= start])
    return (text[:start] + piece + text[stop:]).encode(errors="surrogatepass")


def _mutated_bytes(content: bytes, chooser: random.Random) -> bytes:
    """Return bytes that are cut, flipped, doubled or overwritten, mostly near the start, where headers are."""
    damaged = bytearray(content)
    for _ in range(chooser.choice([1, 1, 1, 2, 8])):
        span = len(damaged) if chooser.random() < 0.4 else min(len(damaged), 200)
        start = chooser.randrange(span + 1)
        action = chooser.randrange(5)
        if action == 0:
            del damaged[start:]
        elif action == 1 and start < len(damaged):
            damaged[start] ^= 1 << chooser.randrange(8)
        elif action == 2:
            piece = chooser.choice(BAD_BYTES)
            damaged[start : start + len(piece)] = piece
        elif action == 3:
            damaged[start:start] = damaged[start : start + chooser.randrange(64)]
        else:
            del damaged[start : start + chooser.randrange(16)]
    return bytes(damaged)


_TEXT_MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".yaml": _mutated_yaml,
    ".json": _mutated_json,
    ".jsonl": _mutated_lines,
    ".jinja": _mutated_template,
}
