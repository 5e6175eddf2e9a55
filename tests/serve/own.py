"""Our own engine with a model that no checkpoint holds."""

from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serve.answer import Answerer, ModelDetails
from mhmoe_ray.serve.chat_template import ChatTemplate
from mhmoe_ray.serve.engine.torch_engine import own_engine
from mhmoe_ray.spec import ServeSpec


def answerer_of(
    model: Decoder, tokenizer: Tokenizer, seq_len: int, spec: ServeSpec, template: ChatTemplate | None = None
) -> Answerer:
    """Our own engine with a model in memory.

    Args:
        model: with all experts, in evaluation mode, float32; the engine's own from now on.
        tokenizer: with tokens for the edges of a document.
        seq_len: tokens that prompt and answer may have together.
        spec: precision, and how many requests.
        template: of conversations.
    """
    engine = own_engine(model, boundaries(tokenizer).ends, token_count(tokenizer), seq_len, spec)
    return Answerer(engine, tokenizer, template, ModelDetails.of("tiny-abc123/step_00000040.1", model.spec))
