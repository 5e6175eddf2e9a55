"""Captions: the text that an encoder writes for images, token by token."""

import torch
from torch import Tensor

from mhmoe_ray.model.encoder import Encoder, EncoderBatch, Group, GroupSize


@torch.no_grad()
def write_captions(model: Encoder, image_NYXC: Tensor, start_token: int, max_tokens: int) -> list[list[int]]:
    """Return the tokens of a caption for each image: at each position the most probable one, up to the end.

    A model learns it by objective `caption`, whose captions end with the start token. An image is encoded again for
    each token, since captions are short.

    Args:
        model: the model in evaluation mode, on the device of the images.
        image_NYXC: images as the model reads them, uint8.
        start_token: the token before a caption.
        max_tokens: largest number of tokens of a caption; with the start token, at most the model's text positions.
    """
    images, device = len(image_NYXC), image_NYXC.device
    token_NT = torch.full((images, 1), start_token, device=device)
    is_open_N = torch.ones(images, dtype=torch.bool, device=device)
    captions: list[list[int]] = [[] for _ in range(images)]
    for _ in range(max_tokens):
        # Images whose captions have ended are left out.
        numbers = is_open_N.nonzero()[:, 0]
        encoded = model.encode(caption_batch(image_NYXC[numbers], token_NT[numbers]))
        next_token_N = torch.full((images,), start_token, device=device)
        # In bfloat16, several tokens would often have the same largest logit.
        with torch.autocast(device.type, enabled=False):
            next_token_N[numbers] = model.output["text"](encoded.text_NTM[:, -1].float()).argmax(-1)
        is_open_N = is_open_N & (next_token_N != start_token)
        if not is_open_N.any():
            break
        for caption, token in zip(captions, next_token_N.tolist(), strict=True):
            # The start token ends a caption.
            if token != start_token:
                caption.append(token)
        token_NT = torch.cat([token_NT, next_token_N[:, None]], 1)
    return captions


def caption_batch(image_NYXC: Tensor, token_NT: Tensor) -> EncoderBatch:
    """Return images and the beginnings of their captions as a micro-batch without losses.

    Args:
        image_NYXC: the images, uint8.
        token_NT: the tokens of each caption, without padding.
    """
    images = len(image_NYXC)
    empty = torch.empty(0, dtype=torch.int64, device=image_NYXC.device)
    return EncoderBatch(
        groups=(Group(GroupSize(images, images, is_joint=True, is_causal=True), 0, 0, ()),),
        image_NYXC=image_NYXC,
        # No patch is hidden, whatever their number, so one column serves for all of them.
        patch_hidden_NP=torch.zeros(images, 1, dtype=torch.bool, device=image_NYXC.device),
        token_NT=token_NT,
        is_token_NT=torch.ones_like(token_NT, dtype=torch.bool),
        hidden_patch_I=empty,
        patch_target_I=empty,
        hidden_token_J=empty,
        token_target_J=empty,
    )
