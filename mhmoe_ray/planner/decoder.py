"""Sizes of decoders: the output layer, the loss over all tokens, and the launches of kernels."""

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.family import INT64, OUTPUT, FamilySizes, Part, bytes_of
from mhmoe_ray.planner.launches import launches_per_micro_batch
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.spec.train import LOSS_CHUNKS_PER_PRODUCT


class DecoderSizes(FamilySizes):
    """Sizes of decoders."""

    def embedding_rows(self, model: ModelSpec) -> int:
        return model.vocab_size

    def output_parts(self, model: ModelSpec) -> list[Part]:
        # With tied embeddings the output has no parameters of its own, but its product still counts.
        macs = model.vocab_size * model.d_model
        parameters = 0 if model.tied_embeddings else macs
        return [Part(OUTPUT, 1, parameters, parameters, macs)]

    def output_bytes(self, spec: RunSpec, size: int) -> int:
        # The terms are those of the loss, and of the token ids and targets. A chunked loss keeps the gradient of its
        # input instead of the input and the log-probabilities.
        model = spec.model
        loss = FLOAT32 * model.vocab_size
        if spec.train.loss_chunk_rows is not None:
            loss = (FLOAT32 - size) * model.d_model
        return spec.tokens_per_micro_batch * (loss + 2 * INT64)

    def shared_attention_bytes(self, spec: RunSpec, size: int) -> int:
        # The tensors are the cosines and sines of positions, for queries and for keys, and the document mask.
        T = spec.data.seq_len
        mask = size * spec.train.micro_batch_size * T**2 if spec.model.document_masks else 0
        return 4 * FLOAT32 * T * spec.model.head_width + mask

    def loss_bytes(self, spec: RunSpec) -> int:
        """Return the bytes that the loss needs temporarily.

        If all logits exist at once, these are the float32 gradients of log-probabilities and logits. A chunked loss
        holds, in float32, the logits and log-probabilities of a chunk, the log-probabilities of the chunk before it,
        and the gradient of the output layer. In the precision of matrix products, it holds the gradients of the logits
        of one product, which covers several chunks in bfloat16, and a copy of the output layer unless ranks gather it
        in this precision.
        """
        tokens, vocab_size = spec.tokens_per_micro_batch, spec.model.vocab_size
        if spec.train.loss_chunk_rows is None:
            return tokens * vocab_size * 2 * FLOAT32
        rows, size = spec.train.loss_chunk_rows, bytes_of(spec.train.precision)
        product_rows = rows if size == FLOAT32 else LOSS_CHUNKS_PER_PRODUCT * rows
        copy_size = size if size < FLOAT32 and not spec.cluster.gathers_in_bfloat16 else 0
        chunks = min(rows, tokens) * 3 * FLOAT32 + min(product_rows, tokens) * size
        return vocab_size * (chunks + spec.model.d_model * (FLOAT32 + copy_size))

    def launches(self, spec: RunSpec) -> int:
        return launches_per_micro_batch(spec)
