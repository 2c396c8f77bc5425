"""Tiny models that show every fault: each published Gemma in its own proportions, with loud random weights.

Default initial weights are so small that attention is nearly uniform, both caps are nearly linear, and a norm of 1 + 0
hides its cast order. Here the weights are amplified until caps, window, positions and norms all move the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.families.family import LayerType
from gemma_ft.families.records import FAMILIES, PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM

# MQA; MHA with N * H != D; GQA (three layers: an odd number); GQA with another ratio; query scale D / N instead of H.
SHAPES = ("gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
# Gemma 3: MQA, one RoPE of each type of layer; the same with a window in the last layer; GQA, where the RoPE of full
# layers is scaled; another ratio; a query scale that is not H's. VaultGemma: MHA, no norm after attention and MLP.
GEMMA_3 = ("gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
VAULT = "vaultgemma-1b"
EVERY = (*SHAPES, *GEMMA_3, VAULT)
FIRST, SECOND = "gemma-2b", "gemma-2-27b"  # one of each family, for laws that do not depend on the shape
THIRD = "gemma-3-27b"
ONE_OF_EACH = (FIRST, SECOND, THIRD, VAULT)
SOME = (*SHAPES, "gemma-3-270m", THIRD, VAULT)  # for what takes longer: of Gemma 3 without and with scaled positions
# How far it is from one layer that sees all keys to the next: of three layers the last one does, as of 270M and 12B, or
# has a window, as of 1B, 4B and 27B; of four it is the other way round.
FULL_EVERY = {"gemma-3-270m": 3, "gemma-3-1b": 2, "gemma-3-4b": 2, "gemma-3-12b": 3, "gemma-3-27b": 2, VAULT: 2}
SHRINK = 16
VOCAB = 101
WINDOW = 8
TOKENS = 21  # longer than two windows


def tiny_config(shape: str, **overrides: Any) -> PreTrainedConfig:
    """The preset `shape` with all its widths divided by SHRINK, three layers, and a window shorter than TOKENS."""
    fields, heads = PRESETS[shape].fields, PRESETS[shape].fields["num_attention_heads"]
    small: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 3,
        "hidden_size": fields["hidden_size"] // SHRINK // heads * heads,  # transformers wants whole heads of it
        "head_dim": fields["head_dim"] // SHRINK,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
    }
    if "query_pre_attn_scalar" in fields:
        small |= {"query_pre_attn_scalar": fields["query_pre_attn_scalar"] // SHRINK, "sliding_window": WINDOW}
    if shape in FULL_EVERY:
        small["layer_types"] = layer_types(shape, overrides.get("num_hidden_layers", 3))
    return PRESETS[shape].config(**{**small, **overrides})


def layer_types(shape: str, layers: int) -> list[LayerType]:
    """The types of so many layers of a tiny model: both, where there are two layers or more."""
    family = FAMILIES[PRESETS[shape].model_type]
    slides = [family.slides(layer, FULL_EVERY[shape]) for layer in range(layers)]
    return ["sliding_attention" if one else "full_attention" for one in slides]


def amplify(model: nn.Module, seed: int = 0) -> None:
    """Loud random weights in place; drawn in float32 by name, so that equal seeds give equal weights in any model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            spread = 0.4 if "norm" in name else 2.0 / weight.shape[-1] ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)


def ours(shape: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> GemmaForCausalLM:
    """Our tiny model of a shape, amplified, in eval mode."""
    model = GemmaForCausalLM(tiny_config(shape, **overrides))
    amplify(model, seed)
    return model.to(dtype).eval()


def reference(shape: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """transformers' model with the same weights, on its eager attention (where there is a cap it has no other)."""
    config = tiny_config(shape, attn_implementation="eager", **overrides)
    model = getattr(transformers, FAMILIES[config.model_type].architecture)(config)
    amplify(model, seed)
    return model.to(dtype).eval()


def token_rows(rows: int = 2, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """Random token ids [rows, tokens] without the control tokens (pad, eos, bos, unk)."""
    return torch.randint(4, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def masked_labels(ids: Tensor, seed: int = 0) -> Tensor:
    """Labels that train about two thirds of the tokens, unevenly over the rows."""
    draw = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    keep = draw > torch.linspace(0.15, 0.5, ids.shape[0])[:, None]
    return ids.where(keep, torch.tensor(-100))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; a parameter without one is a fault of the test."""
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(grad is not None for grad in grads.values()), [name for name, grad in grads.items() if grad is None]
    return grads  # type: ignore[return-value]
