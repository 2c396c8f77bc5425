"""The sizes of a Gemma that its memory follows from: of a preset, or of a folder's config.json, without torch.

Letters, here and in the rest of this room: D hidden, F feed-forward, N query heads, K key/value heads, H head dim,
V vocabulary, R rank of an adapter, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ft.errors import UserError
from gemma_ft.model.presets import PRESETS

# What transformers' GemmaConfig and Gemma2Config say of a field that a preset leaves out (a test compares them).
DEFAULTS: dict[str, Any] = {"vocab_size": 256_000, "sliding_window": 4096, "max_position_embeddings": 8192}
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
          "head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One Gemma's sizes; `windows[i]` is the sliding window of layer i in tokens, None for full attention."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    windows: tuple[int | None, ...]
    second: bool  # Gemma 2: four norms in a layer, and soft-caps

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each linear layer of one decoder layer, by module name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def norms(self) -> int:
        """RMS norms in a layer."""
        return 4 if self.second else 2

    @property
    def layer_linear(self) -> int:
        """Weights in the linear layers of one decoder layer."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def largest_linear(self) -> int:
        """Weights in the largest linear layer."""
        return max(rows * columns for rows, columns in self.linears.values())

    @property
    def norm_weights(self) -> int:
        """Weights of all norms, the final one among them."""
        return (self.layers * self.norms + 1) * self.hidden

    @property
    def embedding(self) -> int:
        """Weights of the embedding, which the head shares."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, the tied head counted once."""
        return self.layers * self.layer_linear + self.norm_weights + self.embedding

    def adapter(self, rank: int, targets: Collection[str] | None = None, *, dora: bool = False) -> int:
        """Weights of a LoRA adapter on the linear layers `targets` (None: on all): R (rows + columns) of each, and a
        magnitude for each row with DoRA. Source: arXiv:2106.09685, arXiv:2402.09353.
        """
        chosen = [size for name, size in self.linears.items() if targets is None or name in targets]
        return self.layers * sum(rank * (rows + columns) + (rows if dora else 0) for rows, columns in chosen)


CLASS_DEFAULTS = {"gemma": "gemma-7b", "gemma2": "gemma-2-2b"}  # what transformers' config classes take for granted


def preset_shape(name: str) -> Shape:
    """The shape of one of PRESETS. Raises: KeyError."""
    preset = PRESETS[name]
    return shape_of(name, {"model_type": preset.model_type, **DEFAULTS, **preset.fields})


def shape_in(folder: Path) -> Shape:
    """The shape that a folder's config.json describes. Raises: UserError, one line, where it is no Gemma's."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a Gemma's: {error}") from error
    if not isinstance(fields, dict) or fields.get("model_type") not in ("gemma", "gemma2"):
        raise UserError(f"{path}: not of Gemma 1 or 2")
    fields = {**DEFAULTS, **PRESETS[CLASS_DEFAULTS[fields["model_type"]]].fields, **fields}
    for name in _SIZES:
        if type(fields.get(name)) is not int or fields[name] < 1:
            raise UserError(f"{path}: {name} {fields.get(name)!r} is no size; fetch the file again")
    return shape_of(folder.name, fields)


def shape_of(name: str, fields: Mapping[str, Any]) -> Shape:
    """The shape that config fields (transformers' names) describe."""
    layers, second = fields["num_hidden_layers"], fields["model_type"] == "gemma2"
    # as Gemma2Config has it: the first layer is local, every other one is
    kinds = fields.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return Shape(
        name=name,
        layers=layers,
        hidden=fields["hidden_size"],
        ffn=fields["intermediate_size"],
        heads=fields["num_attention_heads"],
        kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        vocabulary=fields["vocab_size"],
        max_positions=fields["max_position_embeddings"],
        windows=tuple(fields["sliding_window"] if second and kind == "sliding_attention" else None for kind in kinds),
        second=second,
    )
