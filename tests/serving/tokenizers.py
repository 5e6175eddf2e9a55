"""Tokenizers of each kind, and their decoders of text."""

from mhmoe_ray.data.tokenizer.train import train_unigram
from mhmoe_ray.serving.detokenizer import TextDecoder
from tests.serving.conftest import TEXT, build_tokenizer
from tests.support.llama_tokenizer import llama_tokenizer

TOKENIZER = build_tokenizer()
UNIGRAM = train_unigram(TEXT * 2, 330)
# The vocabulary lacks Japanese and emoji, so their characters are encoded as bytes.
LLAMA = llama_tokenizer(TEXT[:2] * 4, 320)
TOKENIZERS = {"bytes": TOKENIZER, "unigram": UNIGRAM, "fallback": LLAMA}
DECODERS = {kind: TextDecoder(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
