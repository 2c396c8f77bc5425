"""Gemma's layers in plain torch, with transformers' module and weight names.

Letters: B batch, T tokens, S keys (cached ones included), D hidden, N query heads, K key/value heads, H head dim, F
feed-forward. "wide" is float32 or wider: nothing is ever narrowed, so the laws hold to 1e-10 in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from gemma_ft.families.family import LayerKind, Rope
from gemma_ft.kernels.geglu import geglu
from gemma_ft.kernels.rms_norm import rms_norm
from gemma_ft.kernels.rotary import rotate
from gemma_ft.model.attention import BACKENDS, AttentionMask
from gemma_ft.model.config import GemmaNumerics
from gemma_ft.model.kv_cache import Pass
from gemma_ft.model.linear import linear


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or x.dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


class GemmaRMSNorm(nn.Module):
    """`rms_norm` with a weight: [..., D] -> [..., D], added to a residual where one is given."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, residual)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GemmaScaledEmbedding(nn.Embedding):
    """Token ids [B, T] -> embeddings [B, T, D] times sqrt(D), with sqrt(D) rounded to the activation dtype.

    The activation dtype is the weight's, or autocast's where autocast is on, so that a model trained under bf16
    autocast sees the normaliser that it will be served with. No padding_idx: the row of `<pad>` is tied to the head and
    must keep its gradient, or the model learns to emit `<pad>`.
    Source: google/gemma_pytorch gemma/model.py GemmaModel (normalizer).
    """

    @property
    def embed_scale(self) -> Tensor:
        """sqrt(D), rounded to the activation dtype: what a layer around this one multiplies rows with that it looks up
        by itself. A scalar on the CPU, which a GPU need not wait for.

        Source: the name that transformers 5.24's Gemma2TextScaledWordEmbedding has for it, and that peft 0.21.2 reads
        (tuners/tuners_utils.py `_get_embed_scale`).
        """
        kind = self.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return torch.tensor(self.embedding_dim**0.5, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.scaled(super().forward(input))

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows [..., D] of the table -> what the first layer is given."""
        scale = self.embed_scale
        return rows.to(scale.dtype) * scale


def rotary_angles(position_ids: Tensor, head_dim: int, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Position ids [B, T] -> (cos, sin), each [B, 1, T, H] in `dtype` (float32 or wider: angles never pass through
    bf16).

    Source: arXiv:2104.09864 eq. 15, half-split layout of google/gemma_pytorch; a factor divides the frequencies, as
    transformers' rope_type "linear" (modeling_rope_utils.py).
    """
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype) / head_dim
    angles = position_ids[..., None].to(dtype) * (rope.theta**-exponent / rope.factor)  # [B, T, H/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, H]
    return angles.cos(), angles.sin()


def layer_angles(position_ids: Tensor, layers: Sequence[LayerKind], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The `rotary_angles` of each layer; layers of one kind share theirs."""
    kinds = {(kind.rope, kind.head_dim) for kind in layers}
    angles = {(rope, head_dim): rotary_angles(position_ids, head_dim, rope, dtype) for rope, head_dim in kinds}
    return [angles[kind.rope, kind.head_dim] for kind in layers]


class GemmaMLP(nn.Module):
    """gelu_tanh(gate(x)) * up(x), projected down: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: PreTrainedConfig, kind: LayerKind) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, kind.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, kind.intermediate_size, bias=False)
        self.down_proj = nn.Linear(kind.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        middle = geglu(linear(self.gate_proj, x), linear(self.up_proj, x))
        return linear(self.down_proj, middle)


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions: [B, T, D] -> [B, T, D]. N * H need not be D (7B: 16 * 256 !=
    3072).
    """

    def __init__(self, config: PreTrainedConfig, numerics: GemmaNumerics, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.numerics = numerics
        self.layer_idx = layer_idx
        kind, bias = numerics.layers[layer_idx], config.attention_bias
        self.head_dim = kind.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kind.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kind.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps) if numerics.qk_norms else None
        self.k_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps) if numerics.qk_norms else None

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], visible: AttentionMask, cache: Cache | Pass | None = None
    ) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            linear(proj, x).view(batch, tokens, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))  # [B, N or K, T, H]
        query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # [B, K, S, H]
        shared = visible.shared
        if shared is not None:
            query, key, value = (shared.spread(one.transpose(1, 2)).transpose(1, 2) for one in (query, key, value))
        out = BACKENDS[self.config._attn_implementation](
            query,
            key,
            value,
            visible,
            scale=self.numerics.query_scale,
            softcap=self.numerics.attn_softcap,
            dropout_p=(self.config.attention_dropout or 0.0) if self.training else 0.0,
            training=self.training,
        )
        out = out.transpose(1, 2)
        if shared is not None:
            out = shared.distinct(out)
        return linear(self.o_proj, out.reshape(batch, tokens, -1))


class GemmaDecoderLayer(GradientCheckpointingLayer):
    """One layer: attention and MLP, each with its residual. [B, T, D] -> [B, T, D].

    Gemma 1 and VaultGemma normalize what goes into attention and MLP (Gemma 1's post_attention_layernorm is the MLP's
    input norm); Gemma 2 and 3 also what comes out of them, with four norms in all. Source: arXiv:2408.00118 section 2.
    """

    def __init__(self, config: PreTrainedConfig, numerics: GemmaNumerics, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(config, numerics, layer_idx)
        self.mlp = GemmaMLP(config, numerics.layers[layer_idx])
        self.sandwich_norms = numerics.sandwich_norms
        self.pre_mlp_norm = numerics.pre_mlp_norm
        after = ("post_attention_layernorm", "post_feedforward_layernorm") if self.sandwich_norms else ()
        for name in dict.fromkeys(("input_layernorm", *after, self.pre_mlp_norm)):
            self.add_module(name, GemmaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], visible: AttentionMask, cache: Cache | Pass | None = None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), angles, visible, cache)
        if not self.sandwich_norms:
            x = x + attended
            return x + self.mlp(getattr(self, self.pre_mlp_norm)(x))
        x = self.post_attention_layernorm(attended, x)
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)), x)
