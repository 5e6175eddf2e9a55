"""Answerers of our own inference engine for models in memory, without checkpoints."""

from tokenizers import Tokenizer

from mhmoe_ray.data.chat.template import ChatTemplate
from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serving.answer import Answerer, ModelDetails
from mhmoe_ray.serving.engine.torch_engine import own_engine
from mhmoe_ray.spec import ServeSpec


def create_answerer(
    model: Decoder,
    tokenizer: Tokenizer,
    seq_len: int,
    spec: ServeSpec,
    template: ChatTemplate | None = None,
    adds_start: bool = True,
) -> Answerer:
    """Return an answerer of our own engine with a model in memory.

    Args:
        model: A model with all experts, in evaluation mode and float32. The engine owns it from now on.
        tokenizer: A tokenizer with tokens for the start and the end of a document.
        seq_len: The number of tokens that prompt and answer may have together.
        spec: The precision and the number of concurrent requests.
        template: The chat template; None for a model without chat.
        adds_start: Whether each prompt gets a start token.
    """
    engine = own_engine(model, boundaries(tokenizer).ends, token_count(tokenizer), seq_len, spec)
    details = ModelDetails.from_spec("tiny-abc123/step_00000040.1", model.spec)
    return Answerer(engine, tokenizer, template, details, adds_start)
