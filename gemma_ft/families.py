"""Every Gemma as data: what depends on which of them a model is, in one record for each family.

A new size of a known family is one entry under its `sizes`. A new family is a record here, its layers (model/layers.py)
and its parity tests. Letters: D hidden, F feed-forward, N query heads, K key/value heads, H head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from string import Template
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

Fields = Mapping[str, Any]  # of a config.json, by transformers' names
SystemPolicy = Literal["fold", "error", "drop"]  # what becomes of a system text where there is no turn for it
SYSTEM_POLICIES: tuple[SystemPolicy, ...] = get_args(SystemPolicy)
TINY = "gemma-tiny"  # the preset that ships with the project: none of Google's
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder layer


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer: base, transformers' rope_type, and the factor that a scaled type goes by."""

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
class ChatTemplate:
    """How a family's chats are written. A turn is `start_of_turn`, the speaker's name, `after_role`, the text,
    `end_of_turn`, `after_turn`; one BOS begins a chat. Tokens are named here: their ids are the tokenizer's.

    systems: the Jinja text for a system turn under each policy that there is. after_system: between a folded system
    text and the first question. jinja: the whole, with the names below and those of `text` after a dollar sign.
    """

    name: str  # whose it is: "Gemma's"
    jinja: str
    systems: Mapping[SystemPolicy, str]
    pad: str = "<pad>"
    eos: str = "<eos>"
    bos: str = "<bos>"
    start_of_turn: str = "<start_of_turn>"
    end_of_turn: str = "<end_of_turn>"
    user: str = "user"
    model: str = "model"  # Gemma's name for the assistant
    after_role: str = "\n"
    after_turn: str = "\n"
    after_system: str = "\n\n"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The tokens that no text may become."""
        return (self.pad, self.eos, self.bos, self.start_of_turn, self.end_of_turn)

    def text(self, policy: SystemPolicy = "fold", *, marked: bool = True) -> str:
        """Jinja text with which `apply_chat_template` gives ChatEncoder's ids, for text that spells no control token.

        `marked`: what is trained of an answer stands in `{% generation %}`, as `return_assistant_tokens_mask` asks for;
        the text is the same. Source: transformers utils/chat_template_utils.py (AssistantTracker).
        """
        end = f"{{{{ content + '{self.end_of_turn}' }}}}"
        content = (
            f"' }}}}{{% if message['role'] == 'user' %}}{end}"
            f"{{% else %}}{{% generation %}}{end}{{% endgeneration %}}{{% endif %}}{{{{ '"
            if marked
            else f"' + content + '{self.end_of_turn}"
        )
        # A backslash and an n inside a Jinja string literal: the template stays on one line.
        names = {name: value.replace("\n", "\\n") for name, value in vars(self).items() if isinstance(value, str)}
        return Template(self.jinja).substitute(names, system=self.systems[policy], content=content)


@dataclass(frozen=True)
class Gguf:
    """A family as llama.cpp knows it. architecture: in the file; in capitals a name of gguf.MODEL_ARCH, which has the
    names of the tensors.

    plus_one: how the names of tensors end that are stored with 1 added. width_scaled: the numbers of layers at which
    llama.cpp scales queries by D / N, whatever the file says (so it knows a 27B); elsewhere by H.
    """

    architecture: str
    plus_one: str = "norm.weight"
    width_scaled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Preset:
    """One size: its family, where its weights live, and the config fields that differ from transformers' defaults."""

    model_type: str
    weights: str  # hub id, or a folder that ships with the project
    parameters: int | None  # of the published weights, the tied head counted once; None: not published
    fields: dict[str, Any]

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """A fresh transformers config of this size; `overrides` replace single fields."""
        from transformers import AutoConfig  # seconds, and most who read a preset need none of it

        return AutoConfig.for_model(self.model_type, **{**self.fields, **overrides})


@dataclass(frozen=True)
class Family:
    """What all sizes of a Gemma have in common.

    architecture: the class in config.json. defaults: what transformers' config class says of a field that is left out.
    window_period: where config.json has no layer_types, the last of so many layers sees all keys, the others a window;
    None: no layer has a window. sandwich_norms: the outputs of attention and MLP are normalized as well. query_scale:
    the config field whose square root divides the queries. license: the hub's id, and a link.
    """

    label: str
    model_type: str
    architecture: str
    defaults: Fields
    window_period: int | None
    sandwich_norms: bool
    query_scale: str
    attn_softcap: bool
    final_softcap: bool
    chat: ChatTemplate
    gguf: Gguf
    license: tuple[str, str]
    sizes: Mapping[str, Preset]

    @property
    def norms(self) -> int:
        """RMS norms in a layer."""
        return 4 if self.sandwich_norms else 2

    def slides(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has a window where config.json does not say."""
        return self.window_period is not None and (layer + 1) % self.window_period != 0

    def layers(self, fields: Fields) -> tuple[LayerKind, ...]:
        """The kind of each layer of a config, whose fields left out are the family's defaults."""
        fields = {**self.defaults, **fields}
        stored, types = fields.get("rope_parameters"), fields.get("layer_types")
        given = stored if isinstance(stored, Mapping) else {}
        rope = Rope(
            theta=given.get("rope_theta", fields.get("rope_theta", Rope.theta)),
            type=given.get("rope_type", Rope.type),
            factor=given.get("factor", Rope.factor),
        )
        slides = [self.slides(layer) for layer in range(fields["num_hidden_layers"])]
        if self.window_period is not None and types:  # config.json wins
            slides = [kind == "sliding_attention" for kind in types]
        return tuple(
            LayerKind(
                head_dim=fields["head_dim"],
                num_key_value_heads=fields["num_key_value_heads"],
                intermediate_size=fields["intermediate_size"],
                sliding_window=fields["sliding_window"] if sliding else None,
                rope=rope,
            )
            for sliding in slides
        )


# Source: the chat_template of google/gemma-2-2b-it, whose only policy is "error".
TURNS = ChatTemplate(
    name="Gemma's",
    jinja="{{ bos_token }}{% set system = '' %}{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}$system{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] not in ['user', 'assistant', '$model'] "
    "or (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
    "{% set content = message['content'] | trim %}"
    "{% if loop.first and system %}{% set content = system + '$after_system' + content %}{% endif %}"
    "{{ '$start_of_turn' + ('$user' if message['role'] == 'user' else '$model') + '$after_role$content$after_turn' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '$start_of_turn$model$after_role' }}{% endif %}",
    systems={
        "fold": "{% set system = messages[0]['content'] | trim %}",
        "error": "{{ raise_exception('system turns are refused by this model') }}",
        "drop": "",
    },
)
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

# Source of all sizes: google/gemma_pytorch gemma/config.py, and the config.json of each hub id.
GEMMA_1 = Family(
    label="Gemma 1",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    defaults={**_DEFAULTS, **_7B.fields, "sliding_window": None},
    window_period=None,
    sandwich_norms=False,
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
    defaults={**_DEFAULTS, **_2_2B.fields, "sliding_window": 4096},
    window_period=2,
    sandwich_norms=True,
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

FAMILIES = {family.model_type: family for family in (GEMMA_1, GEMMA_2)}
CHATS = tuple({family.chat.name: family.chat for family in FAMILIES.values()}.values())
PRESETS: dict[str, Preset] = {name: preset for family in FAMILIES.values() for name, preset in family.sizes.items()}
PUBLISHED = tuple(name for name, preset in PRESETS.items() if preset.parameters is not None)


def family_of(model_type: object) -> Family | None:
    """The family of what a config.json says as its model_type; None where it is no Gemma of ours."""
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def known_families(word: Literal["and", "or"], families: Iterable[Family] = FAMILIES.values()) -> str:
    """What they are called, in a sentence: "Gemma 1 or 2"."""
    first, *others = (family.label for family in families)
    names = [first, *(label.removeprefix("Gemma ") for label in others)]
    return " ".join(filter(None, (", ".join(names[:-1]), word if others else "", names[-1])))
