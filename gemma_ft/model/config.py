"""The numbers that a config.json decides.

transformers' configuration classes stay the only ones; `GemmaNumerics` reads from each, by its family's record
(families.py), what the layers need, so that no layer asks which family it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.errors import UserError, first_line
from gemma_ft.families.family import Family, LayerKind, Rope
from gemma_ft.families.records import COMPOSITES, family_of
from gemma_ft.model.config_file import other_family, refuse_fields

# transformers reads `hidden_act` for Gemma 1 and `hidden_activation` for Gemma 2, and published files carry a legacy
# "gelu" that means the tanh approximation: every name of a GELU is the same function here, anything else is another
# model.
GELU_NAMES = frozenset({"gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"})

_UNREADABLE = "cannot be read as a Gemma's"


@dataclass(frozen=True)
class GemmaNumerics:
    """The numbers of one config that the layers compute with, the same for every family.

    `layers[i]`: the sizes, window and rotary positions of layer i.
    """

    query_scale: float
    attn_softcap: float | None
    final_softcap: float | None
    layers: tuple[LayerKind, ...]
    sandwich_norms: bool  # what attention and MLP give back is normalized as well
    pre_mlp_norm: str  # the name of the norm before the MLP
    qk_norms: bool  # queries and keys are normalized, each head by itself, before they are rotated

    @property
    def window_tokens(self) -> tuple[int | None, ...]:
        """The sliding window of each layer: keys visible to a query, itself included, or None for full attention."""
        return tuple(kind.sliding_window for kind in self.layers)

    @property
    def windowed(self) -> bool:
        """Whether some layers have a window."""
        return any(window is not None for window in self.window_tokens)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> GemmaNumerics:
        """Read the config of a family that is known.

        Raises: UserError for a model type, activation, RoPE or attention direction that is of none.
        """
        family = family_of(config.model_type)
        if family is None:
            raise UserError(other_family(config.model_type))
        _refuse_bad_numbers(config)
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "gelu")
        if activation not in GELU_NAMES:
            raise UserError(
                f"config.json: activation {activation!r} is not Gemma's tanh GELU; this is not a Gemma model"
            )
        refuse_fields(config.to_dict(), family)
        layers = _checked_layers(config, family)
        return cls(
            query_scale=getattr(config, family.query_scale) ** -0.5,
            attn_softcap=config.attn_logit_softcapping if family.attn_softcap else None,
            final_softcap=config.final_logit_softcapping if family.final_softcap else None,
            layers=layers,
            sandwich_norms=family.sandwich_norms,
            pre_mlp_norm=family.pre_mlp_norm,
            qk_norms=family.qk_norms,
        )


def _checked_layers(config: PreTrainedConfig, family: Family) -> tuple[LayerKind, ...]:
    """The layers of a config. Raises: UserError for a window that is none, or a scale that is no positive number."""
    layers = family.layers(config.to_dict())
    for rope in {kind.rope for kind in layers}:
        _refuse_bad_scale("rope_theta", rope.theta)
        _refuse_bad_scale("factor", rope.factor)
    window = config.sliding_window if family.window_period is not None else 1
    if not isinstance(window, int) or window < 1:
        published = next(iter(family.sizes.values())).fields.get("sliding_window", family.defaults["sliding_window"])
        raise UserError(
            f"config.json: sliding_window {window!r} is no number of tokens; {family.label} has {published}"
        )
    return layers


def read_config(name_or_path: Any, **hub: Any) -> PreTrainedConfig:
    """The config.json of a folder or hub id, as transformers reads it; `hub`: its own options for the hub. Of a folder
    of several models it is the text model's, with the ids of tokens that stand beside it.

    Raises: OSError, ValueError or StrictDataclassError, which transformers says for what it checks; UserError for
    values that it stumbles over.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub)
    except (OSError, ValueError, StrictDataclassError):
        raise
    except ZeroDivisionError as error:
        raise UserError("config.json: num_attention_heads 0 is no number of heads; fetch the file again") from error
    except Exception as error:  # a value of any kind may stand there, and it raises as many kinds
        raise UserError(f"config.json: {first_line(error)}; fetch the file again") from error
    if config.model_type not in COMPOSITES:
        return config
    text = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
        stored = getattr(config, name, None)
        if stored is not None:
            setattr(text, name, stored)
    return text


def config_in(folder: Path) -> PreTrainedConfig:
    """The config.json of a folder. Raises: UserError when it is missing, or no Gemma's."""
    try:
        config = read_config(folder)
        GemmaNumerics.from_config(config)
    except (OSError, ValueError, StrictDataclassError) as error:
        why = first_line(error).removeprefix("config.json: ")
        raise UserError(f"{folder}/config.json: {_UNREADABLE}: {why}") from error
    return config


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation_config.json of a folder, or None where there is none. Raises: UserError when it is damaged."""
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except Exception as error:  # as above
        raise UserError(f"{folder}/generation_config.json: {_UNREADABLE}: {first_line(error)}") from error


def _refuse_bad_numbers(config: PreTrainedConfig) -> None:
    """Raises UserError for a size that no tensor can have, or a scale that is no positive number."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
    scales = ("rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    for name in sizes:
        value = getattr(config, name, None)
        if type(value) is not int or not 1 <= value < 2**31:
            raise UserError(f"config.json: {name} {value!r} is no size; fetch the file again")
    for name in scales:
        _refuse_bad_scale(name, getattr(config, name, None))


def _refuse_bad_scale(name: str, value: object) -> None:
    if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):  # type: ignore[operator]
        raise UserError(f"config.json: {name} {value!r} is no positive number; fetch the file again")


def numerics_hash(config: PreTrainedConfig) -> str:
    """SHA-256 (hex) of what a config.json decides beside the weights: equal weights under another window, scale or cap
    are another model.
    """
    shape = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size")
    numbers = ("query_scale", "attn_softcap", "final_softcap", "window_tokens", "sandwich_norms")
    numerics = GemmaNumerics.from_config(config)
    decided = {name: getattr(numerics, name) for name in numbers} | {name: getattr(config, name) for name in shape}
    ropes = [kind.rope for kind in numerics.layers]
    if numerics.qk_norms or any(rope != Rope(ropes[0].theta) for rope in ropes):
        decided |= {"qk_norms": numerics.qk_norms, "ropes": [astuple(rope) for rope in ropes]}
    else:  # as it was written before there were several
        decided |= {"rope_theta": float(ropes[0].theta)}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
