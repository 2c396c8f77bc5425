"""The published sizes of Gemma, as data. transformers is imported only when a config is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

ModelType = Literal["gemma", "gemma2"]
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)


@dataclass(frozen=True)
class Preset:
    """One published size: its family, where its weights live, and the config fields that differ from transformers'
    defaults.
    """

    model_type: ModelType
    weights: str  # hub id, or a folder that ships with the project
    fields: dict[str, Any]

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """A fresh transformers config of this size; `overrides` replace single fields."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **{**self.fields, **overrides})


def _fields(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int = 256, **rest: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **rest,
    }


_TINY_WINDOW = {"sliding_window": 64, "max_position_embeddings": 2048, "initializer_range": 0.06}

# Source: google/gemma_pytorch gemma/config.py, and the config.json of each hub id.
PRESETS: dict[str, Preset] = {
    "gemma-2b": Preset("gemma", "google/gemma-2b", _fields(18, 2048, 16384, 8, 1)),
    "gemma-7b": Preset("gemma", "google/gemma-7b", _fields(28, 3072, 24576, 16, 16)),
    "gemma-2-2b": Preset("gemma2", "google/gemma-2-2b", _fields(26, 2304, 9216, 8, 4, query_pre_attn_scalar=256)),
    "gemma-2-9b": Preset("gemma2", "google/gemma-2-9b", _fields(42, 3584, 14336, 16, 8, query_pre_attn_scalar=256)),
    "gemma-2-27b": Preset(
        "gemma2", "google/gemma-2-27b", _fields(46, 4608, 36864, 32, 16, 128, query_pre_attn_scalar=144)
    ),
    # The tiny Gemma that ships with the project: all of Gemma 2, small enough to learn on two CPU cores. Its vocabulary
    # is that of its tokenizer, so a fresh one is built with `config(vocab_size=len(tokenizer))`.
    # Fresh weights of a model so narrow learn faster from a wider start than transformers' 0.02.
    "gemma-tiny": Preset(
        "gemma2", "data/gemma-tiny", {**_fields(6, 128, 512, 4, 2, 32, query_pre_attn_scalar=32), **_TINY_WINDOW}
    ),
}
