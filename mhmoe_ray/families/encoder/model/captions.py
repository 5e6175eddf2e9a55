"""Captions: the text that an encoder writes for images, token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mhmoe_ray.families.encoder.model.batch import EncoderBatch, Group, GroupSize
from mhmoe_ray.families.encoder.model.encoder import Encoded, Encoder


@torch.no_grad()
def write_captions(model: Encoder, image_NYXC: Tensor, start_token: int, max_tokens: int) -> list[list[int]]:
    """Return the tokens of a caption for each image, uint8: always the most probable next token.

    The objective `caption` teaches a model to predict the start token after the last token, so a caption ends there.
    The model must have a text position for the start token and for each of `max_tokens` tokens.
    """
    captions: list[list[int]] = [[] for _ in range(len(image_NYXC))]
    numbers = list(range(len(image_NYXC)))
    for _ in range(max_tokens):
        # Images whose captions have ended are left out.
        tokens, _ = next_tokens(model, image_NYXC[numbers], [captions[number] for number in numbers], start_token)
        for number, token in zip(numbers, tokens, strict=True):
            if token != start_token:
                captions[number].append(token)
        numbers = [number for number, token in zip(numbers, tokens, strict=True) if token != start_token]
        if not numbers:
            break
    return captions


@torch.no_grad()
def next_tokens(
    model: Encoder, image_NYXC: Tensor, captions: Sequence[Sequence[int]], start_token: int
) -> tuple[list[int], Encoded]:
    """Return the most probable next token of each caption so far, and the encoder's outputs of this forward pass.

    Images are uint8, at least one; `captions` are without the start token. Each call encodes the images again, without
    a cache, as captions are short.
    """
    length, device = 1 + max(map(len, captions)), image_NYXC.device
    # Shorter captions are padded with the start token. The mask hides the padding from attention.
    token_NT = torch.tensor(
        [[start_token, *caption, *[start_token] * (length - 1 - len(caption))] for caption in captions], device=device
    )
    last_N = torch.tensor([len(caption) for caption in captions], device=device)
    is_token_NT = torch.arange(length, device=device) <= last_N[:, None]
    encoded = model.encode(caption_batch(image_NYXC, token_NT, is_token_NT))
    last_NM = encoded.text_NTM[torch.arange(len(captions), device=device), last_N]
    # In bfloat16, several tokens would often have the same largest logit.
    with torch.autocast(device.type, enabled=False):
        tokens: list[int] = model.output["text"](last_NM.float()).argmax(-1).tolist()
    return tokens, encoded


def caption_batch(image_NYXC: Tensor, token_NT: Tensor, is_token_NT: Tensor) -> EncoderBatch:
    """Return images, uint8, and the beginnings of their captions, from the start token, as a batch without losses."""
    images = len(image_NYXC)
    empty = torch.empty(0, dtype=torch.int64, device=image_NYXC.device)
    return EncoderBatch(
        groups=(Group(GroupSize(images, images, is_joint=True, is_causal=True), 0, 0, ()),),
        image_NYXC=image_NYXC,
        # No patch is hidden, so one column is enough: it is broadcast to all patches.
        patch_hidden_NP=torch.zeros(images, 1, dtype=torch.bool, device=image_NYXC.device),
        token_NT=token_NT,
        is_token_NT=is_token_NT,
        hidden_patch_I=empty,
        patch_target_I=empty,
        hidden_token_J=empty,
        token_target_J=empty,
    )
