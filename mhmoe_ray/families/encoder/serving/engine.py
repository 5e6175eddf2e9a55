"""The engine of encoders: a thread computes up to `max_concurrency` inputs of all requests in one forward pass.

A pass computes either vectors or captions, and the two take turns. A pass for captions computes only one token of each
caption, so that requests for vectors wait for one token at most.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from mhmoe_ray.families.encoder.model import Encoded, Encoder, EncoderBatch, Group, GroupSize
from mhmoe_ray.families.encoder.model.captions import next_tokens
from mhmoe_ray.families.encoder.serving.request import EncodeRequest, Encoding
from mhmoe_ray.model.router.balance import route_counts
from mhmoe_ray.serving.engine.round_engine import Continued, RoundEngine
from mhmoe_ray.spec import ServeSpec


class EncoderEngine(RoundEngine[EncodeRequest, Encoding]):
    """Engine of one encoder. `seq_len` counts the start token of a text, and `start_token` also ends a caption."""

    def __init__(self, model: Encoder, seq_len: int, start_token: int, spec: ServeSpec) -> None:
        super().__init__(model.spec, model.embedding.weight.device, spec)
        self.seq_len, self._model, self._start_token = seq_len, model, start_token
        self._thread.start()

    def _count_input_tokens(self, value: EncodeRequest) -> int:
        return len(value.token_ids) if value.image is None else self._model.image_tokens

    def _count_answer_tokens(self, answer: Encoding) -> int:
        return len(answer.caption_ids or ())

    def _round_key(self, value: EncodeRequest) -> Hashable:
        return value.is_caption

    def _compute(self, inputs: Sequence[EncodeRequest]) -> Sequence[Encoding | Continued[EncodeRequest]]:
        if inputs[0].is_caption:
            return self._continue_captions(inputs)
        encodings = [Encoding()] * len(inputs)
        images = [number for number, value in enumerate(inputs) if value.image is not None]
        texts = [number for number, value in enumerate(inputs) if value.image is None]
        vectors = self._vectors([inputs[n].image for n in images], [inputs[n].token_ids for n in texts])
        for number, encoding in zip([*images, *texts], vectors, strict=True):
            encodings[number] = encoding
        return encodings

    def _continue_captions(self, inputs: Sequence[EncodeRequest]) -> list[Encoding | Continued[EncodeRequest]]:
        """Compute the next token of each caption; return finished captions, and the next inputs of unfinished ones."""
        image_NYXC = self._image_tensor([value.image for value in inputs])
        tokens, encoded = next_tokens(self._model, image_NYXC, [value.token_ids for value in inputs], self._start_token)
        self._count_routes(encoded, [1 + len(value.token_ids) for value in inputs])
        results = list[Encoding | Continued[EncodeRequest]]()
        for value, token in zip(inputs, tokens, strict=True):
            caption = [*value.token_ids, token]
            # `seq_len` counts the start token, which is not part of a caption, so a caption has at most `seq_len - 1`
            # tokens.
            if token == self._start_token:
                results.append(Encoding(caption_ids=caption[:-1], finish_reason="stop"))
            elif len(caption) >= min(value.max_tokens or 0, self.seq_len - 1):
                results.append(Encoding(caption_ids=caption, finish_reason="length"))
            else:
                results.append(Continued(value._replace(token_ids=caption)))
        return results

    def _image_tensor(self, images: Sequence[np.ndarray | None]) -> torch.Tensor:
        size = self._model.spec.encoder.image_size if self._model.spec.encoder else 0
        pixels = np.stack([image for image in images if image is not None]) if images else np.empty((0, size, size, 3))
        return torch.from_numpy(pixels.astype(np.uint8)).to(self._device)

    def _vectors(self, images: Sequence[np.ndarray | None], texts: Sequence[Sequence[int]]) -> list[Encoding]:
        """Return the vectors of images, then those of texts, from one forward pass."""
        image_NYXC = self._image_tensor(images)
        encoder = self._model.spec.encoder
        assert encoder is not None
        length = max((len(text) for text in texts), default=1)
        # Shorter texts are padded with the start token; attention does not see the padding.
        token_NT = torch.full((len(texts), length), self._start_token, device=self._device)
        is_token_NT = torch.zeros(len(texts), length, dtype=torch.bool, device=self._device)
        for row, text in enumerate(texts):
            token_NT[row, : len(text)] = torch.tensor(text, device=self._device)
            is_token_NT[row, : len(text)] = True
        empty = torch.empty(0, dtype=torch.int64, device=self._device)
        patch_hidden_NP = torch.zeros(len(images), encoder.patches, dtype=torch.bool, device=self._device)
        group = Group(GroupSize(len(images), len(texts), is_joint=False), 0, 0, ())
        batch = EncoderBatch((group,), image_NYXC, patch_hidden_NP, token_NT, is_token_NT, empty, empty, empty, empty)
        encoded = self._model.encode(batch)
        head = self._model.match
        assert head is not None
        vectors_NW = torch.cat([head.image_vectors(encoded.image_NSM[:, 0]), head.text_vectors(encoded.text_NTM[:, 0])])
        expert_NLSH = self._count_routes(encoded, [len(text) for text in texts])
        return [
            Encoding(vector, expert_LSH=expert_NLSH[number] if number < len(images) and expert_NLSH.size else None)
            for number, vector in enumerate(vectors_NW.float().cpu().numpy())
        ]

    def _count_routes(self, encoded: Encoded, text_lengths: Sequence[int]) -> np.ndarray:
        """Count the tokens and routes of a pass, without padding, and return the first-choice expert of each sub-token
        of its images, (images, layers, positions, heads), or an empty array if no layer chooses experts."""
        images, positions, _ = encoded.image_NSM.shape
        moe = self._model.spec.moe
        heads = moe.heads if moe else 1
        # The router `smear` averages the weights of all experts for each sample, so that positions choose no experts.
        layers = [] if moe is None or moe.router == "smear" else encoded.routing
        length_N1 = torch.tensor(text_lengths, dtype=torch.int64, device=self._device)[:, None]
        is_token_NT = torch.arange(encoded.text_NTM.shape[1], device=self._device) < length_N1
        is_image_N = torch.ones(images * positions, dtype=torch.bool, device=self._device)
        is_token_N = torch.cat([is_image_N, is_token_NT.flatten()])
        is_row_N = is_token_N.repeat_interleave(heads)
        # The gate of a dropped route is 0.
        counts_LE = [
            route_counts(routing.expert_NK[is_row_N], moe.experts, routing.gate_NK[is_row_N] > 0).tolist()
            for routing in layers
            if moe is not None
        ]
        self._record_pass(counts_LE, int(is_token_N.sum()))
        rows = images * positions * heads
        choices = [routing.expert_NK[:rows, 0].view(images, positions, heads).cpu().numpy() for routing in layers]
        return np.stack(choices, 1) if choices else np.empty(0)
