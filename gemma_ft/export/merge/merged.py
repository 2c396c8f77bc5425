"""The tensors of a merged model, each made when it is asked for: float32 arithmetic, one cast at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gemma_ft.build.contract import Contract
from gemma_ft.build.place import Place
from gemma_ft.build.reward import check_reward_head
from gemma_ft.build.weights import EMBEDDING, HEAD, WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.export.merge.deltas import Adapter
from gemma_ft.export.merge.dequantize import Stored, quantize_dequantize, quantized_names
from gemma_ft.export.merge.low_rank import wide
from gemma_ft.model.reward import HEAD_WEIGHT
from gemma_ft.system import hardware

Policy = Literal["original", "dequantized"]


class MergedWeights:
    """The tensors of a base with adapters merged in; each one is made when it is asked for."""

    def __init__(
        self,
        place: Place,
        adapters: Sequence[Adapter],
        *,
        dtype: torch.dtype | None = None,
        policy: Policy = "original",
    ) -> None:
        """Look at everything that could go wrong, without making any tensor. See `merge_to_folder`."""
        self.place, self.adapters, self.policy = place, adapters, policy
        self.base, self.config = place.of_base.weights, place.of_base.config
        self.precision = trained_precision(place.contract, self.base)
        self.stored = stored_as(place, self.precision)
        self._check_combination()
        self._names = self._checked_names(place.of_base.empty_model)
        self.infos = {name: self._info(name, dtype) for name in self._names}
        if dtype is None and torch.float16 in {kept for kept, _ in self.infos.values()}:
            raise UserError(f"{place.base.name}: stored as float16, in which Gemma overflows; give --dtype bf16 or f32")
        if place.reward and HEAD_WEIGHT not in self.infos:  # the adapter brings it
            self.infos[HEAD_WEIGHT] = torch.float32, (1, self.infos[EMBEDDING][1][1])
        shapes = {name: shape for name, (_, shape) in self.infos.items()}
        for adapter in adapters:
            adapter.check_against(shapes, place.base.name)
            if adapter.added is not None:
                kept, (rows, width) = self.infos[EMBEDDING]
                self.infos[EMBEDDING] = kept, (rows + adapter.added.count, width)
        self._requantized = quantized_names(place.of_base.empty_model) if policy == "dequantized" else set()
        self.changed = {name for adapter in adapters for name in adapter.targets} | self._requantized

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the merged embedding, which stands for the model's."""
        return self.infos[EMBEDDING][0]

    @property
    def vocab_size(self) -> int:
        """Rows of the merged embedding."""
        return self.infos[EMBEDDING][1][0]

    @property
    def bytes(self) -> int:
        """What the merged weights weigh."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.infos.values())

    def other_policy(self) -> MergedWeights | None:
        """The same merge under the other policy, where there is one."""
        if self.stored is None:
            return None
        other: Policy = "dequantized" if self.policy == "original" else "original"
        dtype = self.dtype if {kept for kept, _ in self.infos.values()} == {self.dtype} else None
        return MergedWeights(self.place, self.adapters, dtype=dtype, policy=other)

    def tensor(self, name: str) -> Tensor:
        """One merged tensor, in the dtype that `infos` promises. Raises: UserError when it is not finite."""
        target, _ = self.infos[name]
        if name not in self.changed:
            return self.base.tensor(name).to(target)
        fresh = name not in self.base.names  # the head of a reward model: the adapter has all of it
        weight = torch.zeros(self.infos[name][1]) if fresh else self.base.tensor(name)
        if name in self._requantized and self.stored is not None:
            weight = quantize_dequantize(weight, self.stored)
        weight = weight.to(wide(weight.dtype), copy=True)  # a file's bytes are never written to
        for adapter in self.adapters:
            weight = adapter.apply(name, weight)
        merged = weight.to(target)
        if not bool(torch.isfinite(merged).all()):
            raise UserError(f"{name}: not finite after the merge in {target}; the adapter or the base is damaged")
        return merged

    def _checked_names(self, model: nn.Module) -> list[str]:
        """The base's tensors in the order of its files, without a copy of the embedding as head. `model`: what
        config.json asks for.
        """
        where = self.place.base.name
        expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        head_shape = expected.pop(HEAD, None)
        names = [name for shard in self.base.shards.values() for name in shard if "rotary_emb.inv_freq" not in name]
        if HEAD in names:
            names.remove(HEAD)
            same = self.base.info(HEAD).shape == head_shape and EMBEDDING in names
            if not same or not torch.equal(self.base.tensor(HEAD), self.base.tensor(EMBEDDING)):
                raise UserError(f"{where}: lm_head.weight is not the embedding, as in every Gemma; this is no Gemma")
        lost, unknown = sorted(expected.keys() - set(names)), sorted(set(names) - expected.keys())
        if lost or unknown:
            raise UserError(f"{where}: {'missing' if lost else 'unexpected'} in the weights: {(lost or unknown)[0]}")
        for name in names:
            found = self.base.info(name)
            if found.shape != expected[name]:
                raise UserError(f"{where}: {name} is {list(found.shape)}, config.json asks for {list(expected[name])}")
            if not found.dtype.is_floating_point:
                raise UserError(f"{where}: {name} is stored as {found.dtype}; name the base before it was quantized")
        return names

    def _info(self, name: str, dtype: torch.dtype | None) -> tuple[torch.dtype, tuple[int, ...]]:
        """What is written of a tensor of the base; the head of a reward model keeps its dtype."""
        info = self.base.info(name)
        return (info.dtype if dtype is None or name == HEAD_WEIGHT else dtype), info.shape

    def _check_combination(self) -> None:
        """Raises UserError for adapters that cannot be added up, or a policy that this run does not have."""
        for adapter in self.adapters:
            if (len(self.adapters) > 1 or adapter.share != 1.0) and not adapter.combines:
                what = "an adapter that replaces whole weights, or adds tokens,"
                what = "a DoRA adapter" if adapter.kind == "dora" else what
                raise UserError(f"{adapter.folder}: {what} cannot be weighted or combined; merge it alone, weight 1")
        if self.policy == "dequantized" and self.stored is None:
            raise UserError("--base dequantized: the adapter was not trained over a quantized base; leave it out")


def merged_weights(
    place: Place,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    dtype: torch.dtype | None = None,
    policy: Policy = "original",
) -> MergedWeights:
    """The merged tensors of a place, checked and not yet made; arguments as in `merge_to_folder`.

    Raises: UserError when there is nothing to merge, the base is not the one trained on, or anything does not fit.
    """
    if not adapters:
        if place.adapter is None:
            raise UserError(
                f"{place.base.name}: is a whole model, with nothing to merge; gemma-ft export MODEL --to hf --out DIR "
                "copies it, --adapter DIR names an adapter for it"
            )
        adapters = [(place.adapter, 1.0)]
    places = [place.with_adapter(folder) for folder, _ in adapters]
    for one in places:
        if one.reward:
            check_reward_head(one)
    _check_agreement(places)
    for one in places:
        one.check()
    opened = [
        Adapter.open(one.of_adapter, share)
        for one, (_, share) in zip(places, adapters, strict=True)
        if one.of_adapter is not None
    ]
    return MergedWeights(places[0], opened, dtype=dtype, policy=policy)


def trained_precision(contract: Contract | None, base: WeightFiles) -> torch.dtype:
    """The dtype of frozen weights and activations in training; where no contract tells, float32 for float32 files, else
    bf16.
    """
    if contract is not None and contract.precision is not None:
        return hardware.dtype_by_name(contract.precision)
    wide_file = EMBEDDING in base.names and base.info(EMBEDDING).dtype in (torch.float32, torch.float64)
    return torch.float32 if wide_file else torch.bfloat16


def stored_as(place: Place, precision: torch.dtype) -> Stored | None:
    """How the frozen weights were kept while the adapter of a place was trained; None when they were not quantized."""
    contract = place.contract
    if contract is None or contract.quantize is None:
        return None
    return Stored(contract.quantize, contract.double_quant, precision)


def _check_agreement(places: Sequence[Place]) -> None:
    """Raises UserError when adapters were trained for different templates, tokenizers or quantizations."""
    first = places[0].contract
    for other in places[1:]:
        for key in ("template_sha256", "tokenizer_sha256", "stop_ids", "system", "quantize", "double_quant"):
            one, two = (getattr(contract, key, None) for contract in (first, other.contract))
            if one != two:
                raise UserError(
                    f"{other.adapter}: {key} {two!r} in its contract, {places[0].adapter} has {one!r}; "
                    "adapters that are merged together must have been trained alike"
                )
