"""What llama.cpp takes of a Gemma's numbers from its own code: a model with others is refused."""

from __future__ import annotations

import math

from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.errors import UserError
from gemma_ft.families.family import Family, Gguf
from gemma_ft.families.records import FAMILIES
from gemma_ft.model.config import GemmaNumerics

ELSE = "use --to hf instead"


def known_to_llama_cpp(config: PreTrainedConfig) -> Gguf:
    """The model's family as llama.cpp knows it. Raises: UserError where it does not."""
    family = FAMILIES[config.model_type]
    if family.gguf is None:
        raise UserError(f"config.json: llama.cpp knows no {family.label}; use --to hf")
    return family.gguf


def check_for_llama_cpp(config: PreTrainedConfig) -> None:
    """Raises UserError when llama.cpp would compute another model than `config` describes: it takes some of Gemma's
    numbers from its own code, not from the file.

    Source: llama.cpp src/models/gemma.cpp, gemma2.cpp and gemma3.cpp (load_arch_hparams, graph). Of a Gemma 3
    later versions read the pattern and the base of layers with a window from the file too: earlier ones do not.
    """
    known, family = known_to_llama_cpp(config), FAMILIES[config.model_type]
    numerics = GemmaNumerics.from_config(config)
    _check_query_scale(config, numerics, known)
    _check_caps(numerics, known, family)
    layers, window = range(config.num_hidden_layers), numerics.window_tokens[0]
    expected = tuple(window if family.slides(layer) else None for layer in layers)
    if numerics.window_tokens != expected or (window is None and known.window_rope is not None):
        these = ", ".join([str(layer) for layer in range(10) if family.slides(layer)][:3])
        raise UserError(f"config.json: layer_types: llama.cpp has a window in layers {these}, ... and no other; {ELSE}")
    for kind in numerics.layers:
        if known.window_rope not in (None, kind.rope) and kind.sliding_window is not None:
            raise UserError(
                f"config.json: layers with a window have rope_theta {kind.rope.theta:g} and factor "
                f"{kind.rope.factor:g}, but llama.cpp takes {known.window_rope.theta:g} and "
                f"{known.window_rope.factor:g} there, whatever the file says; {ELSE}"
            )


def _check_query_scale(config: PreTrainedConfig, numerics: GemmaNumerics, known: Gguf) -> None:
    by_width = config.num_hidden_layers in known.width_scaled
    square = config.hidden_size // config.num_attention_heads if by_width else config.head_dim
    if not math.isclose(numerics.query_scale, square**-0.5, rel_tol=1e-6):
        raise UserError(
            f"config.json: query_pre_attn_scalar is {config.query_pre_attn_scalar}, but llama.cpp takes {square} "
            f"({'hidden_size / num_attention_heads' if by_width else 'head_dim'}) whatever the file says; {ELSE}"
        )


def _check_caps(numerics: GemmaNumerics, known: Gguf, family: Family) -> None:
    caps = ((family.attn_softcap, numerics.attn_softcap), (family.final_softcap, numerics.final_softcap))
    if known.always_caps and any(capped and found is None for capped, found in caps):
        raise UserError(f"config.json: a soft-cap is null, but llama.cpp always caps a {family.label}; {ELSE}")
