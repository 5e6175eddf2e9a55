"""Tests of `tokenise_chunk`, which writes a part, the file with a chunk's tokens, or reuses that of an earlier job."""

import numpy as np
import pytest

from mhmoe_ray.data.chat.template import RenderedConversation, Span
from mhmoe_ray.data.prepare.chunks import DocumentChunk
from mhmoe_ray.data.prepare.parts import part_file
from mhmoe_ray.data.prepare.tokenise import TokenisedChunk, tokenise_chunk
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.shards.columns import DOCUMENT_STARTS, TARGETS, TOKENS, conversation_dtype
from mhmoe_ray.data.sources import Document, Tally
from mhmoe_ray.data.tokenizer.train import train_bpe


@pytest.fixture
def tokenise(tmp_path):
    """Return a function that tokenises texts as one chunk; it can reuse the parts of its earlier calls."""
    train_bpe(["a boat on the sea"], 300).save(str(tmp_path / "tokenizer.json"))

    def tokenise_texts(*texts, sha256="1", share=0.5) -> TokenisedChunk:
        table = DocumentChunk(0, 0, [Document(text, 1) for text in texts], Tally(), False).as_table()
        paths = {"tokenizer": tmp_path / "tokenizer.json", "parts": tmp_path / "parts"}
        row = tokenise_chunk(table, **paths, tokenizer_sha256=sha256, validation_fraction=share, token_bytes=2)
        return TokenisedChunk.from_row({key: value for key, [value] in row.items()})

    return tokenise_texts


def test_tokenise_chunk_reuses_a_part_of_the_same_inputs(tokenise):
    first_result = tokenise("a boat", "the sea")
    assert not first_result.is_reused
    second_result = tokenise("a boat", "the sea")
    assert second_result == first_result._replace(is_reused=True)
    for other_result in (tokenise("a boat"), tokenise("a boatthe", " sea"), tokenise("the sea", "a boat")):
        assert not other_result.is_reused
    assert not tokenise("a boat", "the sea", sha256="2").is_reused
    assert not tokenise("a boat", "the sea", share=0.4).is_reused


def test_parts_of_conversations_have_all_columns(tmp_path):
    """The name of a part depends on the rendered conversations, too; the choice of held-out documents does not."""
    train_bpe(["a boat on the sea"], 300).save(str(tmp_path / "tokenizer.json"))
    texts, span = [f"Q: {i}\nA: yes<|endoftext|>" for i in range(9)], Span(7, 24)
    conversations = [RenderedConversation(text, (span,)) for text in texts]

    def tokenise_conversations(conversations):
        documents = [Document(f"{i} yes", 1, conversation=conversation) for i, conversation in enumerate(conversations)]
        chunk = DocumentChunk(0, 0, documents, Tally(), False)
        assert DocumentChunk.from_table(chunk.as_table()) == chunk
        row = tokenise_chunk(
            chunk.as_table(),
            tokenizer=tmp_path / "tokenizer.json",
            parts=tmp_path / "parts",
            tokenizer_sha256="1",
            validation_fraction=0.4,
            token_bytes=2,
        )
        return TokenisedChunk.from_row({key: value for key, [value] in row.items()})

    result = tokenise_conversations(conversations)
    assert tokenise_conversations(conversations) == result._replace(is_reused=True)
    assert not tokenise_conversations([c._replace(spans=()) for c in conversations]).is_reused
    counts = result.part.counts
    assert counts.documents + counts.held_out_documents == 9
    assert counts.held_out_documents == sum(is_validation(f"{i} yes", 0.4) for i in range(9)) > 0
    assert counts.text_bytes == 9 * len("0 yes")
    rows = np.fromfile(part_file(tmp_path / "parts", result.part.name), conversation_dtype(2))
    assert len(rows) == counts.tokens + counts.held_out_tokens
    assert rows[DOCUMENT_STARTS].sum() == 9
    assert (rows[TOKENS][rows[DOCUMENT_STARTS]] == 0).all()
    # " yes" and the end token are targets of each conversation.
    assert rows[TARGETS].sum() == 9 * 5


def test_tokenise_chunk_replaces_a_damaged_part(tokenise, tmp_path):
    first_result = tokenise("a boat", "the sea")
    [tokens_path] = tmp_path.glob("parts/*/*.tokens")
    content = tokens_path.read_bytes()
    tokens_path.write_bytes(content[:-1])
    assert tokenise("a boat", "the sea") == first_result
    assert tokens_path.read_bytes() == content
    tokens_path.unlink()
    assert tokenise("a boat", "the sea") == first_result
    assert tokens_path.read_bytes() == content
