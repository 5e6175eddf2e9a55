"""Causal self-attention with rotary positions, and the key-value cache that generation uses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_ray.spec import ModelSpec


class KVCache:
    """Keys and values of one attention layer for up to `capacity` tokens of B sequences of equal length."""

    def __init__(self, spec: ModelSpec, batch: int, capacity: int, like: Tensor) -> None:
        shape = (batch, spec.attention_heads, capacity, spec.d_model // spec.attention_heads)
        self.k_BHTC, self.v_BHTC = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def extend(self, k_BHTC: Tensor, v_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append the newest tokens; returns all keys and values so far."""
        start, self.length = self.length, self.length + k_BHTC.shape[2]
        self.k_BHTC[:, :, start : self.length] = k_BHTC
        self.v_BHTC[:, :, start : self.length] = v_BHTC
        return self.k_BHTC[:, :, : self.length], self.v_BHTC[:, :, : self.length]


def rotary_angles(spec: ModelSpec, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos_TC and sin_TC of positions start..stop-1 in float32 (RoPE, arXiv 2104.09864, half-split pairing)."""
    width = spec.d_model // spec.attention_heads
    rate = spec.rope_theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(start, stop, device=device, dtype=torch.float64), rate).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def _rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    first, second = x_BHTC.chunk(2, dim=-1)
    return (x_BHTC * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC).to(x_BHTC.dtype)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.attention_heads
        self.qkv = nn.Linear(spec.d_model, 3 * spec.d_model, bias=False)
        self.out = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTM: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """Attend to this and all earlier tokens.

        Args:
            x_BTM: the newest T tokens; with a cache, those that follow what it holds.
            rotary: `rotary_angles` of these T positions.
            cache: extended in place.
        """
        B, T, M = x_BTM.shape
        q, k, v = self.qkv(x_BTM).view(B, T, 3, self.heads, M // self.heads).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(k, v)
        if past == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            visible = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        result: Tensor = self.out(y.transpose(1, 2).reshape(B, T, M))
        return result
