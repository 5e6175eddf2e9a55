"""MH-MoE models in transformers, for use without the package that trained them.

An export contains a copy of this file beside its copy of configuration_mhmoe.py. Both need only torch and transformers;
they were tested with transformers 5.16, 5.19 and 5.24. A model computes the same as in the training package, with these
differences in training: routing drops no sub-tokens, routers add no noise to their logits, selection biases stay
constant, second choices are never left out at random, and the load balancing loss is always computed from shares of
choices over the rows of a batch.

Shape suffixes: B sequences, T tokens, M width of the model (d), H attention heads, C width of a head, N rows
(sub-tokens of width D, by default d/h), E experts, K choices of a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_mhmoe import MhmoeConfig

XPOS_DISTANCE = 512
"""Distance between query and key, in tokens, for which xPos multiplies a frequency's share of the score by its factor,
which is below 1. For twice this distance, the factor is squared."""
INITIAL_TEMPERATURE, MIN_TEMPERATURE = 0.3, 0.01
# transformers has renamed the cache in outputs and arguments of models.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class Routing(NamedTuple):
    """Routing of the rows (sub-tokens) of one layer to experts."""

    logits_NE: Tensor
    balance_NE: Tensor
    """Probabilities of the experts for the load balancing loss."""
    expert_NK: Tensor
    gate_NK: Tensor


@dataclass
class MhmoeModelOutput(MoeModelOutputWithPast):
    """Output of the decoder; `router_logits` has shape (tokens, E) for each head of each layer with experts."""

    routings: tuple[Routing, ...] | None = None
    """Routing of each layer with experts; None without `output_router_logits`."""


def rotary_tables(config: MhmoeConfig, position_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines and sines of rotary positions and xPos's factors, three tensors of shape (B, 1, T, C).

    Queries are multiplied by the factors, and keys are divided by them. The factors are 1 without xPos.
    """
    # Angles are computed in float64, because those of late positions would lose digits in float32. Apple's GPUs have no
    # float64.
    dtype = torch.float32 if position_BT.device.type == "mps" else torch.float64
    position_BT1 = position_BT[..., None].to(dtype)
    width, rope = config.head_dim, config.rope_parameters
    even = torch.arange(0, width, 2, device=position_BT.device, dtype=dtype)
    scale = 1.0
    if rope["rope_type"] == "default":
        frequency = rope["rope_theta"] ** (-even / width)
    else:
        frequency, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
        frequency = frequency.to(position_BT.device, dtype)
    angle = (position_BT1 * frequency).repeat(1, 1, 2)
    xpos = torch.ones_like(angle)
    if config.backbone == "subln":
        base = (even + 0.4 * width) / (1.4 * width)
        xpos = (base ** (position_BT1 / XPOS_DISTANCE)).repeat(1, 1, 2)
    return tuple(t[:, None].float() for t in (angle.cos() * scale, angle.sin() * scale, xpos))


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys after rotating them by their positions."""
    first_half, second_half = x_BHTC.chunk(2, dim=-1)
    return (x_BHTC * cos + torch.cat((-second_half, first_half), dim=-1) * sin).to(x_BHTC.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return the attention output of shape (B, T, H, C) and the weights, as transformers' implementation `eager`."""
    groups = query.shape[1] // key.shape[1]
    score = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if attention_mask is not None:
        score = score + attention_mask
    weight = F.dropout(score.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weight @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), weight


class MhmoeAttention(nn.Module):
    """Causal self-attention with rotary positions and a KV cache."""

    is_causal = True

    def __init__(self, config: MhmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups, self.scaling = heads // kv_heads, width**-0.5
        has_bias = config.attention_bias != "none"
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=has_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=has_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=has_bias)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=config.attention_bias == "all")
        if config.qk_norm != "none":
            widths = (width, width) if config.qk_norm == "head" else (heads * width, kv_heads * width)
            self.q_norm, self.k_norm = (nn.RMSNorm(w, config.rms_norm_eps) for w in widths)
        if config.backbone == "subln":
            self.inner_attn_ln = nn.LayerNorm(heads * width, config.rms_norm_eps)

    def forward(
        self, x_BTM: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        B, T, _ = x_BTM.shape
        shape = (B, T, -1, self.config.head_dim)
        q, k, v = self.q_proj(x_BTM), self.k_proj(x_BTM), self.v_proj(x_BTM)
        if self.config.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin, xpos = tables
        q = rotate(q.transpose(1, 2), cos * xpos, sin * xpos)
        k = rotate(k.transpose(1, 2), cos / xpos, sin / xpos)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        y_BTHC, weight_BHTT = attend(self, q, k, v, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        y_BTM = y_BTHC.reshape(B, T, -1).contiguous()
        if self.config.backbone == "subln":
            y_BTM = self.inner_attn_ln(y_BTM)
        return self.o_proj(y_BTM), weight_BHTT


def swiglu(x: Tensor, gate_layer: nn.Module, up_layer: nn.Module, down_layer: nn.Module) -> Tensor:
    """Return down(silu(gate(x)) * up(x)), where each of the three is a linear layer."""
    return down_layer(F.silu(gate_layer(x)) * up_layer(x))


class MhmoeGatedLayer(nn.Module):
    """SwiGLU without biases: a dense feed-forward layer or a shared expert of the backbone llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class MhmoeGatedExpert(nn.Module):
    """SwiGLU like `MhmoeGatedLayer`, but with Mixtral's names for an expert's matrices: w1, w2 and w3."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.w1, self.w3, self.w2)


class MhmoeNormedLayer(nn.Module):
    """GELU layer with an inner LayerNorm, fc2(norm(gelu(fc1(x)))): a dense layer or expert of backbone `subln`."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


def build_feed_forward(config: MhmoeConfig, width: int, hidden: int, gated_class: type[nn.Module]) -> nn.Module:
    """Return a feed-forward layer or an expert of the configuration's backbone; for llama, a `gated_class`."""
    if config.backbone == "subln":
        return MhmoeNormedLayer(width, hidden, config.rms_norm_eps)
    return gated_class(width, hidden)


class MhmoeRouter(nn.Module):
    """Router of one layer, which chooses the experts of each sub-token. It computes in float32."""

    def __init__(self, config: MhmoeConfig) -> None:
        super().__init__()
        self.config = config
        width, experts = config.row_width, config.num_experts
        if config.router_type == "linear":
            self.weight = nn.Parameter(torch.zeros(experts, width))
        else:
            self.wg_reduction = nn.Linear(width, config.router_dim, bias=False)
            self.wg = nn.Parameter(torch.zeros(experts, config.router_dim))
        if config.router_type == "xmoe":
            self.log_temperature = nn.Parameter(torch.zeros(1))
        if config.router_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, x_ND: Tensor) -> Routing:
        """Return the routing of rows, with the inputs of the router's losses."""
        config = self.config
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.float()
            if self.training and config.router_jitter_noise:
                jitter = config.router_jitter_noise
                x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - jitter, 1 + jitter)
            logits_NE, balance_NE = self.logits(x_ND)
            is_softmax = config.scoring_func == "softmax"
            score_NE = logits_NE.softmax(-1) if is_softmax else logits_NE.sigmoid()
            preference_NE = score_NE
            if config.router_bias:
                preference_NE = score_NE + self.e_score_correction_bias.float()
            if config.n_group > 1:
                preference_NE = self.best_groups(preference_NE)
            expert_NK = preference_NE.topk(config.num_experts_per_tok, dim=-1).indices
            if not config.norm_topk_prob:
                gate_NK = score_NE.gather(-1, expert_NK)
            elif is_softmax:
                gate_NK = logits_NE.gather(-1, expert_NK).softmax(-1)
            else:
                gate_NK = score_NE.gather(-1, expert_NK)
                gate_NK = gate_NK / (gate_NK.sum(-1, keepdim=True) + 1e-20)
            return Routing(logits_NE, balance_NE, expert_NK, gate_NK * config.routed_scaling_factor)

    def logits(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of rows and the probabilities for the load balancing loss, both of shape (N, E)."""
        if self.config.router_type == "linear":
            logits_NE = x_ND @ self.weight.float().T
            if self.config.scoring_func == "softmax":
                return logits_NE, logits_NE.softmax(-1)
            score_NE = logits_NE.sigmoid()
            return logits_NE, score_NE / score_NE.sum(-1, keepdim=True)
        q_NQ, expert_EQ = x_ND @ self.wg_reduction.weight.float().T, self.wg.float()
        if self.config.router_type == "xmoe":
            cosine_NE = F.normalize(q_NQ, dim=-1) @ F.normalize(expert_EQ, dim=-1).T
            logits_NE = cosine_NE / (MIN_TEMPERATURE + self.log_temperature.float().exp())
            return logits_NE, (cosine_NE / INITIAL_TEMPERATURE).softmax(-1)
        logits_NE = q_NQ @ F.normalize(expert_EQ, dim=-1, eps=1e-4).T
        return logits_NE, logits_NE.softmax(-1)

    def best_groups(self, preference_NE: Tensor) -> Tensor:
        """Return the preferences of rows for experts, with -inf outside of the best groups of each row.

        A preference is a score plus the selection bias; a group's value is the sum of its two largest ones
        (DeepSeek-V3).
        """
        groups, kept_groups = self.config.n_group, self.config.topk_group
        preference_NGE = preference_NE.unflatten(-1, (groups, -1))
        value_NG = preference_NGE.topk(min(2, preference_NGE.shape[-1]), dim=-1).values.sum(-1)
        is_kept_NG = torch.zeros_like(value_NG, dtype=torch.bool).scatter_(
            1, value_NG.topk(kept_groups, dim=-1).indices, True
        )
        return preference_NGE.masked_fill(~is_kept_NG[..., None], float("-inf")).flatten(1)


class MhmoeSparseBlock(nn.Module):
    """Multi-head mixture of experts: it splits tokens into sub-tokens, routes them to experts, and merges the results.

    A shared expert, if there is one, computes on whole tokens.
    """

    def __init__(self, config: MhmoeConfig) -> None:
        super().__init__()
        self.config = config
        width, joined_width = config.hidden_size, config.moe_heads * config.row_width
        self.head_proj = build_projection([width, *[joined_width] * config.head_projection_layers])
        self.gate = MhmoeRouter(config)
        self.experts = nn.ModuleList(
            build_feed_forward(config, config.row_width, config.moe_intermediate_size, MhmoeGatedExpert)
            for _ in range(config.num_experts)
        )
        self.merge_proj = build_projection([*[joined_width] * config.merge_projection_layers, width])
        if config.shared_expert_intermediate_size:
            self.shared_expert = build_feed_forward(
                config, width, config.shared_expert_intermediate_size, MhmoeGatedLayer
            )

    def forward(self, x_BTM: Tensor) -> tuple[Tensor, Routing]:
        dropout = self.config.hidden_dropout if self.training else 0.0
        h_BTM = self.head_proj(x_BTM)
        x_ND = h_BTM.reshape(-1, self.config.row_width)
        routing = self.gate(x_ND)
        y_ND = torch.zeros_like(x_ND, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            # An expert that gets no rows (sub-tokens) is computed too, so that in training all parameters have
            # gradients on all ranks.
            row, choice = (routing.expert_NK == e).nonzero(as_tuple=True)
            out_RD = F.dropout(expert(x_ND[row]), dropout)
            y_ND = y_ND.index_add(0, row, out_RD * routing.gate_NK[row, choice, None])
        y_ND = y_ND.to(x_ND.dtype)
        if self.config.sub_token_residual:
            y_ND = x_ND + y_ND
        y_BTM = self.merge_proj(y_ND.view_as(h_BTM))
        if self.config.shared_expert_intermediate_size:
            y_BTM = y_BTM + F.dropout(self.shared_expert(x_BTM), dropout)
        return y_BTM, routing


def build_projection(widths: Iterable[int]) -> nn.Module:
    """Return a linear layer from each width to the next, with ReLU between; the identity for a single width."""
    layers = [nn.Linear(in_width, out_width) for in_width, out_width in pairwise(widths)]
    if len(layers) < 2:
        return layers[0] if layers else nn.Identity()
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))[:-1]


class MhmoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a dense feed-forward layer or a mixture of experts."""

    def __init__(self, config: MhmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = build_norm(config)
        self.self_attn = MhmoeAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config)
        self.is_sparse = config.is_moe_layer(layer_idx)
        if self.is_sparse:
            self.block_sparse_moe = MhmoeSparseBlock(config)
        else:
            self.mlp = build_feed_forward(config, config.hidden_size, config.intermediate_size, MhmoeGatedLayer)

    def forward(
        self, x_BTM: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Routing | None]:
        y_BTM, _ = self.self_attn(self.input_layernorm(x_BTM), tables, mask, cache, **kwargs)
        x_BTM = x_BTM + F.dropout(y_BTM, self.dropout, self.training)
        y_BTM = self.post_attention_layernorm(x_BTM)
        if self.is_sparse:
            y_BTM, routing = self.block_sparse_moe(y_BTM)
            return x_BTM + y_BTM, routing
        return x_BTM + F.dropout(self.mlp(y_BTM), self.dropout, self.training), None


def build_norm(config: MhmoeConfig) -> nn.Module:
    """Return a norm over the width of the model: LayerNorm for the backbone subln, else RMSNorm."""
    norm_class = nn.LayerNorm if config.backbone == "subln" else nn.RMSNorm
    return norm_class(config.hidden_size, config.rms_norm_eps)


class MhmoePreTrainedModel(PreTrainedModel):
    """Base class of MH-MoE models."""

    config_class = MhmoeConfig
    config: MhmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MhmoeDecoderLayer"]  # noqa: RUF012 - transformers reads it from the class
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MhmoeDecoderLayer, "attentions": MhmoeAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MhmoeRouter):
            for name, parameter in module.named_parameters(recurse=False):
                if name == "log_temperature":
                    nn.init.constant_(parameter, torch.tensor(INITIAL_TEMPERATURE - MIN_TEMPERATURE).log().item())
                else:
                    nn.init.normal_(parameter, std=self.config.initializer_range)


class MhmoeModel(MhmoePreTrainedModel):
    """Decoder from token ids to the output of the last block, after the final norm."""

    def __init__(self, config: MhmoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MhmoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MhmoeModelOutput:
        """Return the output for token ids or embeddings, with the arguments of transformers' own decoders."""
        config = self.config
        cache = past_key_values if cache is None else cache
        use_cache = config.use_cache if use_cache is None else use_cache
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        if use_cache and cache is None and not (self.gradient_checkpointing and self.training):
            cache = DynamicCache(config=config)
        x_BTM = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            start = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(start, start + x_BTM.shape[1], device=x_BTM.device)[None]
        # The last two arguments have other names in other versions of transformers, so they are passed by position.
        mask = create_causal_mask(config, x_BTM, attention_mask, cache, position_ids)
        tables = rotary_tables(config, position_ids)
        if config.backbone == "subln":
            x_BTM = x_BTM * config.hidden_size**0.5
        x_BTM = F.dropout(x_BTM, config.hidden_dropout, self.training)
        routings = []
        for layer in self.layers:
            x_BTM, routing = layer(x_BTM, tables, mask, cache, **kwargs)
            if routing is not None:
                routings.append(routing)
        router_logits = None
        if output_router_logits:
            # Trainers compute a load balancing loss from these tensors and the attention mask. They expect tensors with
            # one row per token, so the sub-tokens of each head get a tensor of their own.
            router_logits = tuple(
                logits for r in routings for logits in r.logits_NE.unflatten(0, (-1, config.moe_heads)).unbind(1)
            )
        return MhmoeModelOutput(
            last_hidden_state=self.norm(x_BTM),
            router_logits=router_logits,
            routings=tuple(routings) if output_router_logits else None,
            **{CACHE: cache if use_cache else None},
        )


def router_losses(
    config: MhmoeConfig, routings: tuple[Routing, ...], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the load balancing loss and the router z-loss, each summed over layers, without padding."""
    balance_loss = z_loss = routings[0].logits_NE.new_zeros(())
    is_text_N = None
    if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.all():
        is_text_N = attention_mask.bool().flatten().repeat_interleave(config.moe_heads)
    for routing in routings:
        # Layers may lie on different devices.
        logits_NE, balance_NE, expert_NK = (t.to(balance_loss.device) for t in routing[:3])
        if is_text_N is not None:
            is_text_N = is_text_N.to(balance_loss.device)
            logits_NE, balance_NE, expert_NK = logits_NE[is_text_N], balance_NE[is_text_N], expert_NK[is_text_N]
        counted_NK = expert_NK[:, :1] if config.balance_choices == "first" else expert_NK
        share_E = F.one_hot(counted_NK.flatten(), config.num_experts).float().mean(0)
        balance_loss = balance_loss + config.num_experts * (balance_NE.mean(0) * share_E).sum()
        z_loss = z_loss + logits_NE.logsumexp(-1).square().mean()
    return balance_loss, z_loss


class MhmoeForCausalLM(MhmoePreTrainedModel, GenerationMixin):
    """MH-MoE language model: the decoder and an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MhmoeConfig) -> None:
        super().__init__(config)
        self.model = MhmoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return the logits and, with `labels`, the loss, with the arguments of transformers' own decoders.

        With `output_router_logits`, the loss includes the load balancing loss and the router z-loss with their
        coefficients.
        """
        config = self.config
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs: MhmoeModelOutput = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            cache,
            inputs_embeds,
            use_cache,
            **kwargs,
        )
        kept_tokens = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept_tokens])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **loss_arguments)
        if outputs.routings:
            balance_loss, z_loss = router_losses(config, outputs.routings, attention_mask)
            aux_loss = balance_loss
            if loss is not None:
                weighted_loss = config.router_aux_loss_coef * balance_loss + config.router_z_loss_coef * z_loss
                loss = loss + weighted_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


class MhmoeForSequenceClassification(GenericForSequenceClassification, MhmoePreTrainedModel):
    """MH-MoE classifier or reward model: scores of the last token of each sequence that is not padding."""

    def __init__(self, config: MhmoeConfig) -> None:
        # The initializer of transformers' class takes the decoder from AutoModel, which asks whether to trust its code.
        MhmoePreTrainedModel.__init__(self, config)
        self.model, self.num_labels = MhmoeModel(config), config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
