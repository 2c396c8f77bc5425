"""What an adapter folder changes in its base: LoRA, rsLoRA, DoRA, rows of tokens, and weights that were trained as a
whole.

Everything is read and checked before the base is touched; each tensor of the folder is used exactly once or refused.
Embedding and head are one tensor in every Gemma: what changes either must have stayed one.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from gemma_ft.adapters.adapter_config import resized_fault
from gemma_ft.adapters.kinds import ADAPTER_CONFIG
from gemma_ft.adapters.trainable_tokens import INITIAL, Added, added_by, rows_trained
from gemma_ft.build.place import AdapterFiles
from gemma_ft.build.weights import EMBEDDING, HEAD
from gemma_ft.errors import UserError
from gemma_ft.export.merge.low_rank import ENDINGS, FIRST_ZERO, LowRank, add_low_rank

_PREFIX = "base_model.model."
_ROWS = "trainable_tokens_delta"  # whole rows, whatever the name says
_BASE = ".base_layer.weight"  # a weight of the base that PEFT saved beside what changes it
# Settings of PEFT's LoRA under which its factors are not all that changes a weight, or are kept in another form.
_OTHER_FORMS = ("lora_bias", "use_bdlora", "monteclora_config", "target_parameters")


class Adapter:
    """One adapter folder on its way into a base: `targets` are the weights of the base that it changes.

    `share` is its weight in a linear combination of several.
    """

    def __init__(self, opened: AdapterFiles, share: float) -> None:
        folder, config = opened.folder, opened.config
        self.opened, self.folder, self.files, self.config, self.share = opened, folder, opened.weights, config, share
        self._low_rank: dict[str, LowRank] = {}
        self._whole: dict[str, str] = {}  # replaced as a whole (modules_to_save): target -> tensor of the adapter
        self._rows: str | None = None  # the tensor that holds rows of tokens, and their ids
        self._ids: list[int] = []
        self.added: Added | None = None  # how many of them the base does not have, once it is known
        for name in self.files.names:
            self._place(name)
        self._place_rows()
        for target, change in self._low_rank.items():
            if change.missing or (config.use_dora and "magnitude" not in change.names):
                part = f"lora_{change.missing.pop().upper()}" if change.missing else "lora_magnitude_vector"
                raise UserError(f"{folder}: has no {part} for {target}; the adapter is not whole, save it again")
            change.rank, change.scale = self._scale(target.removesuffix(".weight"))
        self._tie()
        self._check_values()

    @classmethod
    def open(cls, opened: AdapterFiles, share: float = 1.0) -> Adapter:
        """The adapter in a folder, as PEFT saved it.

        Raises: UserError in one line for what is damaged, not finite, untrained, or cannot be merged into weights.
        """
        odd = next((name for name in _OTHER_FORMS if getattr(opened.config, name, None)), None)
        if odd is not None:
            path = opened.folder / ADAPTER_CONFIG
            raise UserError(f"{path}: {odd} is set, which cannot be merged; only LoRA, rsLoRA and DoRA can")
        return cls(opened, share)

    @property
    def targets(self) -> set[str]:
        """Names of the base weights that change."""
        return {*self._low_rank, *self._whole, *([EMBEDDING] if self._ids else [])}

    @property
    def kind(self) -> str:
        """lora, rslora, dora, or token_rows where nothing else was trained."""
        if not self._low_rank and self._ids:
            return "token_rows"
        if any("magnitude" in change.names for change in self._low_rank.values()):
            return "dora"
        return "rslora" if self.config.use_rslora else "lora"

    @property
    def combines(self) -> bool:
        """Whether it is a sum that can be weighted: neither magnitudes nor whole weights nor rows of tokens."""
        return self.kind != "dora" and not self._whole and not self._ids

    def apply(self, target: str, weight: Tensor) -> Tensor:
        """`weight` [O, I] of the base, float32 or wider, changed in place as the adapter says; returned. The embedding
        grows by the rows of added tokens.
        """
        if target in self._whole:
            weight.copy_(self.files.tensor(self._whole[target]))
        if target in self._low_rank:
            change = self._low_rank[target]
            add_low_rank(weight, **change.parts(self.files), scale=change.scale * self.share)
        if target != EMBEDDING or self._rows is None:
            return weight
        rows = self.files.tensor(self._rows).to(weight.dtype)
        return torch.cat((weight, rows)) if self.added else weight.index_copy_(0, torch.tensor(self._ids), rows)

    def check_against(self, shapes: dict[str, tuple[int, ...]], base: str) -> None:
        """Raises UserError naming the first tensor that has no place in a base of these shapes, or does not fit it."""
        known, width = shapes[EMBEDDING]
        fault = resized_fault(self.files.shapes(), known)
        if fault is not None:
            raise UserError(f"{self.folder}: {fault}")
        if self._rows is not None:
            self.added = added_by(self.config, self.folder / ADAPTER_CONFIG, known)
            self._check_shape(self._rows, (len(self._ids), width), base)
        for target in sorted(self.targets - ({EMBEDDING} if self._rows else set())):
            names = list(self._low_rank[target].names.values()) if target in self._low_rank else [self._whole[target]]
            if target not in shapes:
                raise UserError(f"{self.folder}: {names[-1]} belongs to no weight of {base}; wrong base?")
            if target in self._whole:
                self._check_shape(self._whole[target], shapes[target], base)
            wrong = self._low_rank[target].misfit(self.files, shapes[target]) if target in self._low_rank else None
            if wrong is not None:
                self._check_shape(*wrong, base)

    def _check_shape(self, name: str, wanted: tuple[int, ...], base: str) -> None:
        """Raises: UserError where a tensor is not of the shape that the base asks for."""
        found = self.files.info(name).shape
        if found != wanted:
            raise UserError(
                f"{self.folder}: {name} is {list(found)}, {base} asks for {list(wanted)}; wrong base, or a config that "
                "is not this adapter's"
            )

    def _place_rows(self) -> None:
        """Raises: UserError where the file does not hold the rows that the config speaks of, for both ends of the
        model.
        """
        rows = rows_trained(self.config, self.folder / ADAPTER_CONFIG)
        if not rows:
            return
        self._ids = next(iter(rows.values()))
        held = [name for name in self.files.names if name.endswith(_ROWS)]
        count = self.files.info(held[0]).shape[0] if held else 0
        if count != len(self._ids):
            raise UserError(
                f"{self.folder}: has rows of {count} tokens, the config names {len(self._ids)}; save it again"
            )
        ends = {name for name in held if name.removeprefix(_PREFIX).startswith(EMBEDDING.removesuffix("weight"))}
        first = self.files.tensor(held[0])
        alike = all(ids == self._ids for ids in rows.values())
        if not ends or not alike or any(not torch.equal(self.files.tensor(name), first) for name in held[1:]):
            raise UserError(f"{self.folder}: {_APART}")
        (self._rows,) = ends

    def _place(self, name: str) -> None:
        """Find out which weight a tensor belongs to. Raises: UserError for a tensor that no merge can use."""
        if name == INITIAL or name.endswith(_ROWS):
            return
        inner = name.removeprefix(_PREFIX)
        for ending, part in ENDINGS.items():
            if name.startswith(_PREFIX) and inner.endswith(ending):
                self._low_rank.setdefault(inner.removesuffix(ending) + ".weight", LowRank()).names[part] = name
                return
        if not name.startswith(_PREFIX) or "lora_" in inner or not inner.endswith(".weight"):
            raise UserError(f"{self.folder}: {name} cannot be merged; only LoRA, rsLoRA and DoRA can")
        self._whole[inner.replace(_BASE, ".weight")] = name

    def _scale(self, module: str) -> tuple[int, float]:
        """Rank and scale of one module: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732 theorem 3.2).

        Patterns are matched as PEFT matches them.
        """
        config = self.config
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        if not abs(scale * self.share) <= torch.finfo(torch.float32).max:
            raise UserError(
                f"{self.folder}: alpha {alpha} over rank {rank}, times its weight {self.share}, overflows float32; "
                "give it a smaller weight"
            )
        return rank, scale

    def _tie(self) -> None:
        """Raises: UserError where embedding and head did not stay one; the change of both is the embedding's."""
        for changes in (self._low_rank, self._whole):
            found = [target for target in (EMBEDDING, HEAD) if target in changes]
            if len(found) == 2:
                one, other = (self._values(target, changes) for target in found)
                tied = one.keys() == other.keys() and all(torch.equal(one[part], other[part]) for part in one)
            else:  # PEFT trains a copy of the one it was told of, unless it was told to tie the other to it
                tied = not found or self.config.ensure_weight_tying or not self._was_target(found[0])
            if any("magnitude" in self._low_rank[one].names for one in found if one in self._low_rank):
                raise UserError(f"{self.folder}: {_MAGNITUDES}")
            if not tied:
                raise UserError(f"{self.folder}: {_APART}")
            if found == [HEAD]:
                changes[EMBEDDING] = changes[HEAD]  # type: ignore[assignment]
            changes.pop(HEAD, None)

    def _values(self, target: str, changes: dict[str, Any]) -> dict[str, Tensor]:
        change = changes[target]
        return change.parts(self.files) if isinstance(change, LowRank) else {"whole": self.files.tensor(change)}

    def _was_target(self, target: str) -> bool:
        """Whether a weight was named to be trained, and is not one that PEFT saved beside others."""
        module = target.removesuffix(".weight").rpartition(".")[2]
        copied = any(name.rpartition(".")[2] == module for name in self.config.modules_to_save or ())
        return copied or target in self._low_rank

    def _check_values(self) -> None:
        """Raises UserError for values that are not finite, and for an adapter that changes nothing."""
        does_something = bool(self._ids) or any(_BASE not in name for name in self._whole.values())
        for name in self.files.names:
            tensor = self.files.tensor(name)
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{self.folder}: {name} holds NaN or infinite values; take an earlier checkpoint")
            does_something |= name.endswith(FIRST_ZERO) and bool(tensor.any())
        if not does_something and self.kind != "dora":
            raise UserError(f"{self.folder}: every lora_B is zero, so it was never trained; there is nothing to merge")


_APART = (
    "embedding and head were trained apart, but are one tensor in every Gemma; train with ensure_weight_tying=True in "
    "PEFT's LoraConfig"
)
_MAGNITUDES = (
    "DoRA on the embedding or the head cannot be merged: they are one tensor in every Gemma, and each has its own "
    "magnitude; train them without use_dora, with ensure_weight_tying=True in PEFT's LoraConfig"
)


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """What merge.json says of an adapter."""
    return {
        "folder": "/".join(adapter.folder.resolve().parts[-2:]),
        "weight": adapter.share,
        "kind": adapter.kind,
        "rank": getattr(adapter.config, "r", None),
        "sha256": adapter.files.fingerprint(),
    }
