"""What a Gemma is as data: the types of which the records in records.py are made.

Letters: D hidden, F feed-forward, N query heads, K key/value heads, H head dim, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from gemma_ft.families.chat_template import ChatTemplate

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

Fields = Mapping[str, Any]  # of a config.json, by transformers' names
LayerType = Literal["full_attention", "sliding_attention"]
LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
_TEXT_MODEL, _HEAD = ("layers", "embed_tokens", "norm"), "lm_head"  # the modules of a text model, and the one around it
REWARD_HEAD = "score"  # of a reward model, in place of the head for tokens: transformers' name
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder layer


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer: base, transformers' rope_type, and the factor by which the type "linear" divides the
    frequencies.
    """

    theta: float = 10_000.0
    type: str = "default"
    factor: float = 1.0


@dataclass(frozen=True)
class LayerKind:
    """The sizes of one decoder layer. sliding_window: keys visible to a query, itself included; None: all (the
    layers of the model are given it as `window_tokens`).
    """

    head_dim: int
    num_key_value_heads: int
    intermediate_size: int
    sliding_window: int | None
    rope: Rope


@dataclass(frozen=True)
class Gguf:
    """A family as llama.cpp knows it. architecture: in the file; in capitals a name of gguf.MODEL_ARCH, which has the
    names of the tensors.

    plus_one: how the names of tensors end that are stored with 1 added. width_scaled: the numbers of layers at which
    llama.cpp scales queries by D / N, whatever the file says (so it knows a 27B); elsewhere by H. always_caps: it has
    the family's caps, and no model without. window_rope: what it takes for layers with a window, whatever the file
    says; None: what all layers have. cut: the table ends with the last token, however many rows config.json has.
    """

    architecture: str
    plus_one: str = "norm.weight"
    width_scaled: frozenset[int] = frozenset()
    always_caps: bool = True
    window_rope: Rope | None = None
    cut: bool = False


@dataclass(frozen=True)
class Composite:
    """A folder of several models, of which the text model is one. model_type: what its config.json says; architecture:
    the class that it names. text_prefix: of the text model's modules in that class, as transformers and PEFT name them;
    file_prefixes: of the text model's tensors in published files, the one that transformers writes first. parts: how
    the names of the other models' tensors begin, in files of any age. soft_tokens: the tokens whose places the other
    models fill; the table of a text-only size may end before them.
    """

    model_type: str
    architecture: str
    text_prefix: str
    file_prefixes: tuple[str, ...]
    parts: tuple[str, ...]
    soft_tokens: tuple[str, ...] = ()

    @property
    def key_mapping(self) -> dict[str, str]:
        """From a text model's names in such a folder to those of a text model alone, as transformers and PEFT take it:
        regular expression -> what it becomes, the first that is found.
        """
        prefixes = "|".join(map(re.escape, self._prefixes))
        return {rf"^(?:{prefixes})": "model.", r"^language_model\.lm_head\.": "lm_head."}

    def native(self, name: str) -> str | None:
        """The name that a tensor or module has in a text model alone, where it is one of a text model's under whatever
        prefix, or none; None where it belongs to another model of the folder; else as it is.
        """
        if name.startswith(self.parts):
            return None
        for prefix in (*self._prefixes, "language_model.", "model.", ""):
            rest = name.removeprefix(prefix)
            top = rest.partition(".")[0]
            if name.startswith(prefix) and top in (*_TEXT_MODEL, _HEAD):
                return rest if top == _HEAD else f"model.{rest}"
        return name

    def outward(self, name: str) -> str:
        """The name that a tensor or module of a text model has in the class of the folder."""
        rest = name.removeprefix("model.")
        return f"{self.text_prefix}{rest}" if rest != name else name

    @property
    def _prefixes(self) -> list[str]:
        return sorted(self.file_prefixes, key=len, reverse=True)


@dataclass(frozen=True)
class Preset:
    """One size: its family, where its weights live, and the config fields that differ from transformers' defaults.
    beside: parameters that lie in the published folder beside the text model, and are never read.
    """

    model_type: str
    weights: str  # hub id, or a folder that ships with the project
    parameters: int | None  # of the published text weights, the tied head counted once; None: not published
    fields: dict[str, Any]
    beside: int = 0

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """A fresh transformers config of this size; `overrides` replace single fields."""
        from transformers import AutoConfig  # seconds, and most who read a preset need none of it

        return AutoConfig.for_model(self.model_type, **{**self.fields, **overrides})


@dataclass(frozen=True)
class Family:
    """What all sizes of a Gemma have in common.

    architecture: the class in config.json. defaults: what transformers' config class says of a field that is left out.
    window_period: where config.json has no layer_types, the last of so many layers sees all keys, the others a window;
    None: no layer has a window. sandwich_norms: the outputs of attention and MLP are normalized as well.
    pre_mlp_norm: the name of the norm before the MLP. qk_norms: queries and keys are normalized, each head by itself.
    query_scale: the config field whose square root divides the queries. ropes: of each type of layer, where config.json
    does not say; several types: config.json says it for each. rope_types: those that are computed. license: the hub's
    id, and a link. gguf: None where llama.cpp does not know it. classifier: transformers' class for a reward model of
    it; None where it has none.
    """

    label: str
    model_type: str
    architecture: str
    defaults: Fields
    window_period: int | None
    sandwich_norms: bool
    pre_mlp_norm: Literal["post_attention_layernorm", "pre_feedforward_layernorm"]
    query_scale: str
    attn_softcap: bool
    final_softcap: bool
    chat: ChatTemplate
    gguf: Gguf | None
    license: tuple[str, str]
    sizes: Mapping[str, Preset]
    qk_norms: bool = False
    ropes: Mapping[LayerType, Rope] = field(default_factory=lambda: {"full_attention": Rope()})
    rope_types: tuple[str, ...] = ("default",)
    composite: Composite | None = None
    classifier: str | None = None

    @property
    def norms(self) -> int:
        """RMS norms of D numbers in a layer."""
        return 4 if self.sandwich_norms else 2

    def slides(self, layer: int, period: int | None = None) -> bool:
        """Whether a layer, counted from 0, has a window where config.json has no layer_types; `period`: its own
        sliding_window_pattern, where it has one.
        """
        return self.window_period is not None and (layer + 1) % (period or self.window_period) != 0

    def layer_types(self, fields: Fields) -> tuple[LayerType, ...]:
        """The type of each layer of a config, whose fields left out are the family's defaults."""
        fields = {**self.defaults, **fields}
        layers, stored = fields["num_hidden_layers"], fields.get("layer_types")
        if self.window_period is None:
            return ("full_attention",) * layers
        if stored:  # config.json wins
            return tuple("sliding_attention" if kind == "sliding_attention" else "full_attention" for kind in stored)
        slides = [self.slides(layer, fields.get("sliding_window_pattern")) for layer in range(layers)]
        return tuple("sliding_attention" if one else "full_attention" for one in slides)

    def layers(self, fields: Fields) -> tuple[LayerKind, ...]:
        """The kind of each layer of a config, whose fields left out are the family's defaults."""
        types = self.layer_types(fields)
        fields = {**self.defaults, **fields}
        return tuple(
            LayerKind(
                head_dim=fields["head_dim"],
                num_key_value_heads=fields["num_key_value_heads"],
                intermediate_size=fields["intermediate_size"],
                sliding_window=fields["sliding_window"] if one == "sliding_attention" else None,
                rope=self.rope(one, fields),
            )
            for one in types
        )

    def rope(self, layer_type: LayerType, fields: Fields) -> Rope:
        """The rotary positions of a type of layer by a config, in the words of any version of transformers: in
        `rope_parameters` (for each type of layer, where the family has several), or in `rope_theta`, `rope_scaling`
        (of full layers) and `rope_local_base_freq` (the base of sliding ones).
        """
        several = len(self.ropes) > 1
        usual = self.ropes[layer_type if several else "full_attention"]
        full = layer_type == "full_attention" or not several
        stored = fields.get("rope_parameters")
        given: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
        if several:
            given = given.get(layer_type) or {}
        scaling = fields.get("rope_scaling") if full else None
        if isinstance(scaling, Mapping):  # of both, transformers takes the old one
            given = {**given, **scaling}
        theta: float = fields.get("rope_theta" if full else "rope_local_base_freq") or usual.theta
        kind = given.get("rope_type", given.get("type", Rope.type))
        return Rope(
            theta=given.get("rope_theta", theta),
            type=kind,
            factor=Rope.factor if kind == Rope.type else given.get("factor", Rope.factor),  # as transformers
        )
