"""Small tokenizers for conversations, and functions that return the text of each token of a conversation.

The functions do not use the offsets of tokens, from which the tested code computes the targets."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER
from tests.data.chat.templates import BEGIN, END
from tests.support.llama_tokenizer import llama_tokenizer

TEXTS = [
    "User:",
    "Assistant: hello, how are you today?",
    "I am fine, thank you. And the weather is nice",
    "größer als 日本語 und 🦊",
    "user assistant system",
]


@cache
def byte_level_tokenizer(special_tokens: tuple[str, ...] = (), *, trims_offsets: bool = False) -> Tokenizer:
    """Return a byte-level BPE with <s> and </s>, and more special tokens.

    Args:
        special_tokens: the names of the other special tokens.
        trims_offsets: whether it has a post-processor that takes white space out of offsets, as GPT-2's has.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trims_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BEGIN, END, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def sentence_tokenizer(special_tokens: tuple[str, ...] = ()) -> Tokenizer:
    """Return a tokenizer like LLaMA's and Mistral's, with more special tokens.

    A space belongs to the next word, a text begins with a space, and characters that are not in `TEXTS` become bytes.
    """
    tokenizer = llama_tokenizer(TEXTS, 380)
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "byte-level, trimmed": lambda special_tokens: byte_level_tokenizer(special_tokens, trims_offsets=True),
    "sentence": sentence_tokenizer,
}


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes that a token stands for, with the space that a tokenizer puts before words."""
    text = tokenizer.id_to_token(token)
    if token in tokenizer.get_added_tokens_decoder():
        return text.encode()
    if text.startswith("<0x"):
        return bytes([int(text[3:5], 16)])
    if "▁" in text or tokenizer.normalizer is not None:
        return text.replace("▁", " ").encode()
    return bytes(BYTE_OF_LETTER[letter] for letter in text)


def token_spans(tokenizer: Tokenizer, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Return the first byte of each token in the text, and the end of its bytes, by reading along the text.

    A space that the tokenizer has put before a word has no bytes of the text.
    """
    content, position, spans = text.encode(), 0, []
    for token in ids:
        token_content = token_bytes(tokenizer, token)
        if not content.startswith(token_content, position):
            assert token_content[:1] == b" ", "only a space may have been added"
            token_content = token_content[1:]
        assert content.startswith(token_content, position)
        spans.append((position, position + len(token_content)))
        position += len(token_content)
    assert position == len(content)
    return spans
