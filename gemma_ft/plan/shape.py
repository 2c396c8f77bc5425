"""The sizes of a Gemma that its memory follows from: of a preset, or of a folder's config.json, without torch.

Letters, here and in the rest of this room: D hidden, F feed-forward, N query heads, K key/value heads, H head dim,
V vocabulary, R rank of an adapter, T tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_ft.errors import UserError
from gemma_ft.families.family import LINEARS
from gemma_ft.families.records import FAMILIES, PRESETS, family_of, known_families, text_fields

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
    norms: int  # RMS norms of D numbers in a layer
    qk_norms: bool  # norms of H numbers, one of queries and one of keys, in a layer
    angles: int  # kinds of rotary angles among the layers, of which those of one kind share theirs
    attn_softcap: bool
    final_softcap: bool
    text_only: bool = False  # other models lie beside it in its folder, which are never read
    beside: int = 0  # their parameters, where they are known

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each linear layer of one decoder layer, by module name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        into, out = [(size, self.hidden) for size in (queries, keys, keys)], [(self.hidden, queries)]
        mlp = [(self.ffn, self.hidden), (self.ffn, self.hidden), (self.hidden, self.ffn)]
        return dict(zip(LINEARS, [*into, *out, *mlp], strict=True))

    @property
    def layer_linear(self) -> int:
        """Weights in the linear layers of one decoder layer."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def largest_linear(self) -> int:
        """Weights in the largest linear layer."""
        return max(rows * columns for rows, columns in self.linears.values())

    @property
    def layer_norms(self) -> int:
        """Weights of the norms of one decoder layer."""
        return self.norms * self.hidden + (2 * self.head_dim if self.qk_norms else 0)

    @property
    def norm_weights(self) -> int:
        """Weights of all norms, the final one among them."""
        return self.layers * self.layer_norms + self.hidden

    @property
    def normed_rows(self) -> int:
        """Rows that the norms of one decoder layer divide by their root mean square, for each token: D numbers each,
        or the H of one head.
        """
        return self.norms + (self.heads + self.kv_heads if self.qk_norms else 0)

    @property
    def normed(self) -> int:
        """Numbers in those rows."""
        return self.norms * self.hidden + (self.heads + self.kv_heads) * self.head_dim * self.qk_norms

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
        return sum(size * count for size, count in self.adapter_tensors(rank, targets, dora=dora).items())

    def adapter_tensors(
        self, rank: int, targets: Collection[str] | None = None, *, dora: bool = False
    ) -> dict[int, int]:
        """Sizes of the tensors of such an adapter, and how many there are of each."""
        found: Counter[int] = Counter()
        for name, (rows, columns) in self.linears.items():
            if targets is None or name in targets:
                found.update([rank * rows, rank * columns, *([rows] if dora else [])])
        return {size: self.layers * count for size, count in found.items()}

    @property
    def tensors(self) -> dict[int, int]:
        """Sizes of all tensors of the model, and how many there are of each."""
        layer = Counter([rows * columns for rows, columns in self.linears.values()])
        layer.update({self.hidden: self.norms, self.head_dim: 2 * self.qk_norms})
        found = Counter({size: self.layers * count for size, count in layer.items() if count})
        found.update([self.hidden, self.embedding])
        return found


def preset_shape(name: str) -> Shape:
    """The shape of one of PRESETS. Raises: KeyError."""
    preset = PRESETS[name]
    shape = shape_of(name, {"model_type": preset.model_type, **preset.fields})
    return replace(shape, text_only=preset.beside > 0, beside=preset.beside)


def shape_in(folder: Path) -> Shape:
    """The shape that a folder's config.json describes. Raises: UserError, one line, where it is no Gemma's."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a Gemma's: {error}") from error
    stored = fields if isinstance(fields, dict) else {}
    fields = text_fields(stored)
    family = family_of(fields.get("model_type"))
    if family is None:
        raise UserError(f"{path}: not of {known_families('or')}")
    sizes = {**family.defaults, **fields}
    for name in _SIZES:
        if type(sizes.get(name)) is not int or sizes[name] < 1:
            raise UserError(f"{path}: {name} {sizes.get(name)!r} is no size; fetch the file again")
    return replace(shape_of(folder.name, fields), text_only=fields is not stored)


def shape_of(name: str, fields: Mapping[str, Any]) -> Shape:
    """The shape that config fields (transformers' names) of a known family describe."""
    family = FAMILIES[fields["model_type"]]
    fields = {**family.defaults, **fields}
    layers = family.layers(fields)
    return Shape(
        name=name,
        layers=fields["num_hidden_layers"],
        hidden=fields["hidden_size"],
        ffn=fields["intermediate_size"],
        heads=fields["num_attention_heads"],
        kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        vocabulary=fields["vocab_size"],
        max_positions=fields["max_position_embeddings"],
        windows=tuple(kind.sliding_window for kind in layers),
        norms=family.norms,
        qk_norms=family.qk_norms,
        angles=len({(kind.rope, kind.head_dim) for kind in layers}),
        attn_softcap=family.attn_softcap and fields["attn_logit_softcapping"] is not None,
        final_softcap=family.final_softcap and fields["final_logit_softcapping"] is not None,
    )
