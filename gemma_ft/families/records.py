"""Every Gemma as data: what depends on which of them a model is, in one record for each family.

A new size of a known family is one entry under its `sizes`. A new family is a record here, its layers (model/layers.py)
and its parity tests. Letters: as in family.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from gemma_ft.families.chat_template import TURNS, TURNS_OF_PARTS
from gemma_ft.families.family import Composite, Family, Fields, Gguf, Preset, Rope

TINY = "gemma-tiny"  # the preset that ships with the project: none of Google's
GEMMA_TERMS = ("gemma", "https://ai.google.dev/gemma/terms")


def _size(
    model_type: str, weights: str, parameters: int | None, *, D: int, F: int, layers: int, N: int, K: int, H: int = 256,
    **others: Any
) -> Preset:  # fmt: skip
    """A preset; `others`: further fields of its config."""
    fields = {"num_hidden_layers": layers, "hidden_size": D, "intermediate_size": F, "num_attention_heads": N,
              "num_key_value_heads": K, "head_dim": H, **others}  # fmt: skip
    return Preset(model_type, weights, parameters, fields)


_gemma, _gemma2 = partial(_size, "gemma"), partial(_size, "gemma2")
_DEFAULTS = {"vocab_size": 256_000, "max_position_embeddings": 8192}
_7B = _gemma("google/gemma-7b", 8_537_680_896, D=3072, F=24576, layers=28, N=16, K=16)
_2_2B = _gemma2("google/gemma-2-2b", 2_614_341_888, D=2304, F=9216, layers=26, N=8, K=4, query_pre_attn_scalar=256)
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

# Source of all sizes: google/gemma_pytorch gemma/config.py, and the config.json of each hub id.
GEMMA_1 = Family(
    label="Gemma 1",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    defaults={**_DEFAULTS, **_7B.fields, "sliding_window": None},
    window_period=None,
    sandwich_norms=False,
    pre_mlp_norm="post_attention_layernorm",
    query_scale="head_dim",
    attn_softcap=False,
    final_softcap=False,
    chat=TURNS,
    gguf=Gguf("gemma"),
    license=GEMMA_TERMS,
    sizes={
        "gemma-2b": _gemma("google/gemma-2b", 2_506_172_416, D=2048, F=16384, layers=18, N=8, K=1),
        "gemma-7b": _7B,
    },
)
GEMMA_2 = Family(
    label="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    defaults={**_DEFAULTS, **_2_2B.fields, **_CAPS, "sliding_window": 4096},
    window_period=2,
    sandwich_norms=True,
    pre_mlp_norm="pre_feedforward_layernorm",
    query_scale="query_pre_attn_scalar",
    attn_softcap=True,
    final_softcap=True,
    chat=TURNS,
    gguf=Gguf("gemma2", width_scaled=frozenset((46,))),
    license=GEMMA_TERMS,
    sizes={
        "gemma-2-2b": _2_2B,
        "gemma-2-9b": _gemma2(
            "google/gemma-2-9b", 9_241_705_984, D=3584, F=14336, layers=42, N=16, K=8, query_pre_attn_scalar=256
        ),
        "gemma-2-27b": _gemma2(
            "google/gemma-2-27b", 27_227_128_320, D=4608, F=36864, layers=46, N=32, K=16, H=128,
            query_pre_attn_scalar=144,
        ),
        # The tiny Gemma that ships with the project: all of Gemma 2, small enough to learn on two CPU cores. Its
        # vocabulary is that of its tokenizer, so a fresh one is built with `config(vocab_size=len(tokenizer))`.
        # Fresh weights of a model so narrow learn faster from a wider start than transformers' 0.02.
        TINY: _gemma2(
            f"data/{TINY}", None, D=128, F=512, layers=6, N=4, K=2, H=32, query_pre_attn_scalar=32,
            sliding_window=64, max_position_embeddings=2048, initializer_range=0.06,
        ),
    },
)  # fmt: skip
VAULTGEMMA = Family(
    label="VaultGemma",
    model_type="vaultgemma",
    architecture="VaultGemmaForCausalLM",
    defaults=GEMMA_2.defaults,
    window_period=2,
    sandwich_norms=False,
    pre_mlp_norm="pre_feedforward_layernorm",
    query_scale="query_pre_attn_scalar",
    attn_softcap=True,
    final_softcap=True,
    chat=TURNS,
    gguf=None,
    license=GEMMA_TERMS,
    sizes={
        # Every layer sees all keys. Source: transformers docs/source/en/model_doc/vaultgemma.md.
        "vaultgemma-1b": _size(
            "vaultgemma", "google/vaultgemma-1b", 1_038_741_120, D=1152, F=6912, layers=26, N=4, K=4,
            query_pre_attn_scalar=256, max_position_embeddings=1024,
            layer_types=["full_attention"] * 26,
        ),
    },
)  # fmt: skip


VISION_TOWER, VISION_WIDTH = 416_866_032, 1152  # weights of Gemma 3's, and the size of what it gives


def _gemma3(weights: str, parameters: int, *, long: bool, D: int, **sizes: Any) -> Preset:
    """A size of Gemma 3; `long`: of those from 4B on, with 128k tokens of context and the padded vocabulary of folders
    that hold a vision tower and its projector, a norm and a matrix.
    """
    full: dict[str, Any] = {"rope_theta": 1_000_000.0, "rope_type": "default"}
    full |= {"rope_type": "linear", "factor": 8.0} if long else {}
    ropes = {"full_attention": full, "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"}}
    others = {"query_pre_attn_scalar": 256, "rope_parameters": ropes, "sliding_window": 1024 if long else 512,
              "vocab_size": 262_208 if long else 262_144,
              "max_position_embeddings": 131_072 if long else 32_768}  # fmt: skip
    preset = _size("gemma3_text", weights, parameters, D=D, **{**others, **sizes})
    return replace(preset, beside=VISION_TOWER + VISION_WIDTH * (D + 1) if long else 0)


# Source of the sizes: google/gemma_pytorch gemma/config.py, google-deepmind/gemma gm/nn/_gemma.py; counted on the meta
# device, and with the vision tower and its projector the published totals.
GEMMA_3 = Family(
    label="Gemma 3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    # The config class's own, which are of no published size: the text_config of 4B leaves five of them out.
    defaults={"vocab_size": 262_208, "max_position_embeddings": 131_072, "hidden_size": 2304, "intermediate_size": 9216,
              "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
              "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": None,
              "final_logit_softcapping": None},
    window_period=6,
    sandwich_norms=True,
    pre_mlp_norm="pre_feedforward_layernorm",
    qk_norms=True,
    query_scale="query_pre_attn_scalar",
    attn_softcap=False,
    final_softcap=True,
    ropes={"full_attention": Rope(1_000_000.0), "sliding_attention": Rope(10_000.0)},
    rope_types=("default", "linear"),
    composite=Composite(
        model_type="gemma3",
        architecture="Gemma3ForConditionalGeneration",
        text_prefix="model.language_model.",
        file_prefixes=("language_model.model.", "model.language_model.", "model.language_model.model."),
        parts=("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
        soft_tokens=("<image_soft_token>",),
    ),
    chat=TURNS_OF_PARTS,
    gguf=Gguf("gemma3", width_scaled=frozenset((62,)), always_caps=False, window_rope=Rope(10_000.0), cut=True),
    license=GEMMA_TERMS,
    sizes={
        "gemma-3-270m": _gemma3(
            "google/gemma-3-270m", 268_098_176, long=False, D=640, F=2048, layers=18, N=4, K=1
        ),
        "gemma-3-1b": _gemma3("google/gemma-3-1b-pt", 999_885_952, long=False, D=1152, F=6912, layers=26, N=4, K=1),
        "gemma-3-4b": _gemma3("google/gemma-3-4b-pt", 3_880_263_168, long=True, D=2560, F=10240, layers=34, N=8, K=4),
        "gemma-3-12b": _gemma3(
            "google/gemma-3-12b-pt", 11_766_034_176, long=True, D=3840, F=15360, layers=48, N=16, K=8
        ),
        "gemma-3-27b": _gemma3(
            "google/gemma-3-27b-pt", 27_009_346_304, long=True, D=5376, F=21504, layers=62, N=32, K=16, H=128,
            query_pre_attn_scalar=168,
        ),
    },
)  # fmt: skip

FAMILIES = {family.model_type: family for family in (GEMMA_1, GEMMA_2, GEMMA_3, VAULTGEMMA)}
COMPOSITES = {one.model_type: one for one in (family.composite for family in FAMILIES.values()) if one is not None}
CHATS = tuple({family.chat.jinja: family.chat for family in FAMILIES.values()}.values())
PRESETS: dict[str, Preset] = {name: preset for family in FAMILIES.values() for name, preset in family.sizes.items()}
PUBLISHED = tuple(name for name, preset in PRESETS.items() if preset.parameters is not None)


def family_of(model_type: object) -> Family | None:
    """The family of what a config.json says as its model_type; None where it is no Gemma of ours, or a folder of
    several models (COMPOSITES).
    """
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def text_fields(fields: Fields) -> Fields:
    """What a config.json says of its text model: `text_config` in a folder of several models, else all of it."""
    composite = COMPOSITES.get(str(fields.get("model_type")))
    text = fields.get("text_config", {})
    if composite is None or not isinstance(text, Mapping):
        return fields
    return {**text, "model_type": next(key for key, family in FAMILIES.items() if family.composite is composite)}


def known_families(word: Literal["and", "or"], families: Iterable[Family] = FAMILIES.values()) -> str:
    """What they are called, in a sentence: "Gemma 1 or 2"."""
    first, *others = (family.label for family in families)
    names = [first, *(label.removeprefix("Gemma ") for label in others)]
    return " ".join(filter(None, (", ".join(names[:-1]), word if others else "", names[-1])))
