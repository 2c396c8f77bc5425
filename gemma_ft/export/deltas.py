"""What an adapter folder changes in its base: LoRA, rsLoRA, DoRA, and weights that were trained as a whole.

Everything is read and checked before the base is touched; each tensor of the folder is used exactly once or refused.
Letters: O rows and I columns of a base weight, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from gemma_ft.adapters.saved import adapter_config
from gemma_ft.adapters.token_rows import INITIAL, TRAINED, Added, added_by
from gemma_ft.errors import UserError
from gemma_ft.weights import EMBEDDING, HEAD, WeightFiles

_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Initial weights that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga) start by rewriting it.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Settings of PEFT under which an adapter computes something else than W + scale * B A, beside those that no model of
# ours takes (adapters.saved).
_OTHER_FORMS = (
    "fan_in_fan_out",
    "lora_bias",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight of `dtype` is merged in: float32, or wider where it is."""
    return torch.promote_types(dtype, torch.float32)


def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, *, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """`weight` [O, I] changed in place to W + scale * B A, for A [R, I] and B [O, R]; returned.

    With a magnitude m [O] (DoRA) each row is then brought to its length: m * (W + scale * B A) / |W + scale * B A|.
    The arithmetic has the dtype of `weight`, which is float32 or wider; no second tensor of its size is made.
    Source: arXiv:2106.09685 eq. 3; arXiv:2402.09353 eq. 5; peft 0.21.2 tuners/lora/layer.py `get_delta_weight`,
    variants.py `DoraLinearVariant.merge_safe`.
    """
    assert weight.dtype == wide(weight.dtype), "a merge in less than float32 loses what was trained"
    weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=scale)
    if magnitude is not None:
        weight.mul_((magnitude.to(weight.dtype) / torch.linalg.vector_norm(weight, dim=1))[:, None])
    return weight


@dataclass
class _LowRank:
    """The names of the tensors that change one weight, and by how much."""

    names: dict[str, str] = field(default_factory=dict)  # a, b, magnitude -> tensor of the adapter
    rank: int = 0
    scale: float = 0.0


class Adapter:
    """One adapter folder on its way into a base: `targets` are the weights of the base that it changes.

    `share` is its weight in a linear combination of several.
    """

    def __init__(self, folder: Path, files: WeightFiles, config: LoraConfig, share: float) -> None:
        self.folder, self.files, self.config, self.share = folder, files, config, share
        self._low_rank: dict[str, _LowRank] = {}
        self._whole: dict[str, str] = {}  # trained as a whole (modules_to_save): target -> tensor of the adapter
        self.added = self._added()
        for name in files.names:
            if name not in (TRAINED, INITIAL):
                self._place(name)
        for target, change in self._low_rank.items():
            missing = {"a", "b"} - change.names.keys()
            if missing or (config.use_dora and "magnitude" not in change.names):
                part = "lora_magnitude_vector" if not missing else f"lora_{missing.pop().upper()}"
                raise UserError(f"{folder}: has no {part} for {target}; the adapter is not whole, save it again")
            change.rank, change.scale = self._scale(target.removesuffix(".weight"))
        self._tie()
        self._check_values()

    @classmethod
    def open(cls, folder: Path, share: float = 1.0) -> Adapter:
        """The adapter in `folder`, as PEFT saved it.

        Raises: UserError in one line for what is damaged, not finite, untrained, or cannot be merged into weights.
        """
        path, config = folder / "adapter_config.json", adapter_config(folder)
        odd = next((name for name in _OTHER_FORMS if getattr(config, name, None)), None)
        if odd is not None:
            raise UserError(f"{path}: {odd} is set, which cannot be merged; only LoRA, rsLoRA and DoRA can")
        if config.init_lora_weights not in _PLAIN_STARTS:
            raise UserError(
                f"{path}: init_lora_weights {config.init_lora_weights!r} rewrote the base; save it as a plain LoRA "
                "with PEFT's path_initial_model_for_weight_conversion"
            )
        return cls(folder, WeightFiles.open(folder, stem="adapter_model"), config, share)

    @property
    def targets(self) -> set[str]:
        """Names of the base weights that change."""
        return {*self._low_rank, *self._whole, *([EMBEDDING] if self.added else [])}

    @property
    def kind(self) -> str:
        """lora, rslora or dora."""
        if any("magnitude" in change.names for change in self._low_rank.values()):
            return "dora"
        return "rslora" if self.config.use_rslora else "lora"

    @property
    def combines(self) -> bool:
        """Whether it is a sum that can be weighted: neither magnitudes nor whole weights nor tokens of its own."""
        return self.kind != "dora" and not self._whole and self.added is None

    def replaces(self, target: str) -> bool:
        """Whether the base's value of a weight is not needed."""
        return target in self._whole

    def apply(self, target: str, weight: Tensor) -> Tensor:
        """`weight` [O, I] of the base, float32 or wider, changed in place as the adapter says; returned. The embedding
        grows by the rows of added tokens.
        """
        if target == EMBEDDING and self.added is not None:
            return torch.cat((weight, self.files.tensor(TRAINED).to(weight.dtype)))
        if target in self._whole:
            return weight.copy_(self.files.tensor(self._whole[target]))
        change = self._low_rank.get(target)
        if change is None:
            return weight
        parts = {part: self.files.tensor(name) for part, name in change.names.items()}
        return add_low_rank(weight, **parts, scale=change.scale * self.share)

    def check_against(self, shapes: dict[str, tuple[int, ...]], base: str) -> None:
        """Raises UserError naming the first tensor that has no place in a base of these shapes, or does not fit it."""
        if self.added is not None:
            rows, width = shapes[EMBEDDING]
            first, found = self.added.first, self.files.info(TRAINED).shape
            if first < rows:
                raise UserError(f"{self.folder}: trains rows that {base} has itself (from id {first}); wrong base?")
            if first != rows or found[1:] != (width,):
                raise UserError(
                    f"{self.folder}: adds tokens from id {first} in rows of {found[-1]}, {base} has {rows} rows of "
                    f"{width}; wrong base?"
                )
        for target in sorted(self.targets - ({EMBEDDING} if self.added else set())):
            change = self._low_rank.get(target)
            names = change.names if change else {"whole": self._whole[target]}
            if target not in shapes:
                raise UserError(f"{self.folder}: {names.popitem()[1]} belongs to no weight of {base}; wrong base?")
            rows, *columns = shapes[target]
            wanted = {"whole": shapes[target], "magnitude": (rows,)}
            if change:
                wanted |= {"a": (change.rank, *columns), "b": (rows, change.rank)}
            for part, name in names.items():
                found = self.files.info(name).shape
                if found != wanted[part]:
                    raise UserError(
                        f"{self.folder}: {name} is {list(found)}, {base} asks for {list(wanted[part])}; wrong base, or "
                        "a config that is not this adapter's"
                    )

    def _added(self) -> Added | None:
        """Raises: UserError where the file does not hold the rows that the config speaks of."""
        said = added_by(self.config, self.folder / "adapter_config.json")
        if said is None:
            return None
        count = self.files.info(TRAINED).shape[0] if TRAINED in self.files.names else 0
        if count != said.count:
            raise UserError(f"{self.folder}: has rows of {count} tokens, the config names {said.count}; save it again")
        return said

    def _place(self, name: str) -> None:
        """Find out which weight a tensor belongs to. Raises: UserError for a tensor that no merge can use."""
        inner = name.removeprefix(_PREFIX)
        for ending, part in _PARTS.items():
            if name.startswith(_PREFIX) and inner.endswith(ending):
                target = inner.removesuffix(ending) + ".weight"
                if target in (EMBEDDING, HEAD):
                    raise UserError(f"{self.folder}: {name}: {_TIED}")
                self._low_rank.setdefault(target, _LowRank()).names[part] = name
                return
        if ".lora_embedding_" in name or name.endswith(".base_layer.weight"):
            raise UserError(f"{self.folder}: {name}: {_TIED}")
        if not name.startswith(_PREFIX) or "lora_" in inner or not inner.endswith(".weight"):
            raise UserError(f"{self.folder}: {name} cannot be merged; only LoRA, rsLoRA and DoRA can")
        self._whole[inner] = name

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
        """Embedding and head are one tensor in every Gemma: what was trained must have stayed one."""
        found = [target for target in (EMBEDDING, HEAD) if target in self._whole]
        if not found:
            return
        if len(found) == 2:
            one, other = (self.files.tensor(self._whole[target]) for target in found)
            tied = torch.equal(one, other)
        else:  # PEFT trains a copy of the one it was told of, unless it was told to tie the other to it
            module = found[0].removesuffix(".weight").rpartition(".")[2]
            copied = any(name.rpartition(".")[2] == module for name in self.config.modules_to_save or ())
            tied = self.config.ensure_weight_tying or not copied
        if not tied:
            raise UserError(
                f"{self.folder}: embedding and head were trained apart, but are one tensor in every Gemma; train with "
                "ensure_weight_tying=True in PEFT's LoraConfig"
            )
        self._whole[EMBEDDING] = self._whole.pop(found[0])
        self._whole.pop(HEAD, None)

    def _check_values(self) -> None:
        """Raises UserError for values that are not finite, and for an adapter that changes nothing."""
        does_something = bool(self._whole) or self.added is not None
        for name in self.files.names:
            tensor = self.files.tensor(name)
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{self.folder}: {name} holds NaN or infinite values; take an earlier checkpoint")
            does_something |= name.endswith(".lora_B.weight") and bool(tensor.any())
        if not does_something and self.kind != "dora":
            raise UserError(f"{self.folder}: every lora_B is zero, so it was never trained; there is nothing to merge")


_TIED = "an adapter on the embedding or the head cannot be merged: they are one tensor in every Gemma"


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """What merge.json says of an adapter."""
    return {
        "folder": "/".join(adapter.folder.resolve().parts[-2:]),
        "weight": adapter.share,
        "kind": adapter.kind,
        "rank": adapter.config.r,
        "sha256": adapter.files.fingerprint(),
    }
