"""Tokens of rendered conversations, with a mask of the tokens that a model learns to predict."""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import EXCHANGES, SPELLING_MARK, ChatTemplate, RenderedConversation, Span
from mhmoe_ray.data.shards.columns import DOCUMENT_STARTS, TARGETS, TOKENS, join_columns, token_dtype
from mhmoe_ray.data.tokenizer.load import read_tokenizer
from mhmoe_ray.data.tokenizer.vocabulary import boundaries


class EncodedConversation(NamedTuple):
    """Token ids of a conversation and the mask of its targets."""

    token_ids: np.ndarray
    """(n,) int64. The first is the start token, which is added unless the template writes it."""
    target_mask: np.ndarray
    """(n,) bool: True for tokens of the assistant's turns, including those that end a turn."""

    def rows(self, token_bytes: int) -> np.ndarray:
        """Return a row of all stored columns for each token."""
        document_starts = np.arange(len(self.token_ids)) == 0
        tokens = self.token_ids.astype(token_dtype(token_bytes))
        return join_columns({TOKENS: tokens, TARGETS: self.target_mask, DOCUMENT_STARTS: document_starts})


class ConversationEncoder:
    """Encoder that gives a conversation the same token ids as a server; its text may have special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.start_token = boundaries(tokenizer).start
        # The post-processor is removed: without special tokens it would add nothing, but a byte-level one would take
        # white space out of the tokens' offsets.
        content = json.loads(tokenizer.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        self._special_ids = {
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }

    def encode(self, conversations: Sequence[RenderedConversation]) -> list[EncodedConversation]:
        """Return the tokens of each conversation."""
        texts = [conversation.text.split(SPELLING_MARK) for conversation in conversations]
        encodings = iter(self._tokenizer.encode_batch([*chain(*texts)], add_special_tokens=False))
        result = []
        for conversation, pieces in zip(conversations, texts, strict=True):
            token_ids, target_mask, start = np.empty(0, np.int64), np.empty(0, bool), 0
            for piece, encoding in zip(pieces, encodings, strict=False):
                token_ids = np.append(token_ids, np.array(encoding.ids, np.int64))
                # Offsets are in characters. A token that is only a part of a character has the offsets of the whole
                # character.
                offsets = start + np.array(encoding.offsets, np.int64).reshape(-1, 2)
                target_mask = np.append(target_mask, _tokens_in(conversation.spans, offsets))
                start += len(piece) + len(SPELLING_MARK)
            if token_ids[:1].tolist() != [self.start_token]:
                token_ids, target_mask = np.append(self.start_token, token_ids), np.append(False, target_mask)
            result.append(EncodedConversation(token_ids, target_mask))
        return result

    def turn_ends(self, template: ChatTemplate) -> frozenset[int]:
        """Return the ids of special tokens that end the assistant's turns, by trying the template.

        A ChatTemplateError says that there is none, or that prompt and answer share a token.
        """
        messages = EXCHANGES if template.accepts(EXCHANGES) else EXCHANGES[:2]
        conversation = template.render_conversation(messages)
        [encoded] = self.encode([conversation])
        turn_ends = set[int]()
        for span in conversation.spans:
            turn, prompt = self.encode(
                [conversation._replace(spans=(span,)), RenderedConversation(conversation.text[: span.start], ())]
            )
            if not np.array_equal(prompt.token_ids, encoded.token_ids[: len(prompt.token_ids)]):
                raise ChatTemplateError(
                    "the end of its prompt and the beginning of an answer become one token, so a server would ask "
                    "otherwise than in training; let the prompt end without a blank, and begin the answer with it"
                )
            special_ids = [i for i in turn.token_ids[turn.target_mask].tolist() if i in self._special_ids]
            end_text = self._tokenizer.id_to_token(special_ids[-1]) if special_ids else None
            # White space may follow the token that ends a turn, such as the line break of ChatML.
            if end_text is None or conversation.text[slice(*span)].rpartition(end_text)[2].strip():
                raise ChatTemplateError(
                    "it ends the assistant's turns with no special token of the tokenizer, so a model could not learn "
                    "to end them; write {{ eos_token }} there"
                )
            turn_ends.add(special_ids[-1])
        return frozenset(turn_ends)


def _tokens_in(spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """Return a mask of the tokens that overlap a span; `offsets` (n, 2) has each token's first character and end."""
    starts, stops = offsets.T
    # A token may have no characters of its own, such as the space that a tokenizer puts before a word. It counts as
    # part of the character after it.
    stops = np.maximum(stops, starts + 1)
    mask = np.zeros(len(offsets), bool)
    for span in spans:
        mask |= (starts < span.stop) & (stops > span.start)
    return mask


@lru_cache(maxsize=1)
def conversation_encoder(path: Path) -> ConversationEncoder:
    """Return the encoder of a tokenizer.json; a process caches the last one."""
    return ConversationEncoder(read_tokenizer(path))
