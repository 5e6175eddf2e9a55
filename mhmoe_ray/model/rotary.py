"""Rotary positions (RoPE, arXiv 2104.09864), and their scaling for texts longer than those of pretraining."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.model import RopeScaling


class RotaryTables(NamedTuple):
    """Cosines and sines, float32, for T positions; queries and keys differ only with xPos."""

    q_cos_TC: Tensor
    q_sin_TC: Tensor
    k_cos_TC: Tensor
    k_sin_TC: Tensor


def rotary_tables(spec: ModelSpec, position_T: Tensor) -> RotaryTables:
    """Return RoPE's cosines and sines for each position (arXiv 2104.09864, half-split pairing). An architecture's
    `query_scale` multiplies those of queries and divides those of keys."""
    # Angles are computed in float64, because those of late positions would lose digits in float32.
    width, position = spec.head_width, position_T.double()
    frequency, factor = _frequencies(spec, position.device)
    angle = torch.outer(position, frequency).repeat(1, 2)
    cos, sin = angle.cos() * factor, angle.sin() * factor
    scale = modules_of(spec).query_scale(width, position)
    if scale is None:
        return RotaryTables(cos.float(), sin.float(), cos.float(), sin.float())
    return RotaryTables((cos * scale).float(), (sin * scale).float(), (cos / scale).float(), (sin / scale).float())


def _frequencies(spec: ModelSpec, device: torch.device) -> tuple[Tensor, float]:
    """Return RoPE's frequencies (C/2), radians per token, float64, and a factor, 1 except in YaRN."""
    even_indices = torch.arange(0, spec.head_width, 2, device=device, dtype=torch.float64)
    frequency = spec.rope_theta ** (-even_indices / spec.head_width)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequency, 1.0
    if scaling.type == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.type == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
        kept_share = _kept_share_yarn(spec, scaling, device)
    else:
        factor, kept_share = 1.0, _kept_share_llama3(frequency, scaling)
    return frequency * kept_share + frequency / scaling.factor * (1 - kept_share), factor


def _kept_share_yarn(spec: ModelSpec, scaling: RopeScaling, device: torch.device) -> Tensor:
    """Return the share, 0 to 1, of each frequency (C/2) that YaRN does not scale (arXiv 2309.00071, section 3.2). It
    falls linearly from the dimension whose angle makes `beta_fast` full turns within the context length of pretraining
    to that with `beta_slow` turns."""
    width, original_length = spec.head_width, scaling.original_length
    assert original_length is not None

    def dimension(turns: float) -> float:
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), width - 1)
    indices = torch.arange(width // 2, device=device, dtype=torch.float64)
    # Without the minimum of 0.001, equal bounds would cause a division by zero.
    return 1 - ((indices - low) / max(high - low, 0.001)).clamp(0, 1)


def _kept_share_llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the share, 0 to 1, of each frequency (C/2) that Llama 3.1 does not scale. It rises linearly with the full
    turns within the context length of pretraining, from `low_freq_factor` to `high_freq_factor` turns."""
    assert scaling.original_length is not None
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate queries or keys by the angles of their positions, in their own dtype."""
    first_half, second_half = x_BHTC.chunk(2, dim=-1)
    return (x_BHTC * cos_TC + torch.cat((-second_half, first_half), dim=-1) * sin_TC).to(x_BHTC.dtype)
