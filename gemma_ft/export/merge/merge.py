"""An adapter merged into its base: a complete folder, a tensor at a time, or a model in memory.

Memory holds one shard of what is written and one float32 tensor. Tensors that no adapter touches keep their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ft.build.place import Place
from gemma_ft.build.reward import refuse_reward_form
from gemma_ft.build.text_weights import model_weights
from gemma_ft.build.weights import WeightFiles, dtype_name, write_shards
from gemma_ft.errors import UserError
from gemma_ft.export.graft import Graft
from gemma_ft.export.hf_folder import check_out, commit_model_folder, write_beside_weights
from gemma_ft.export.merge.deltas import facts_of
from gemma_ft.export.merge.merged import MergedWeights, Policy, merged_weights
from gemma_ft.recipe.run_files import FACTS
from gemma_ft.system import environment
from gemma_ft.system.files import write_json
from gemma_ft.system.limits import MAX_SHARD_BYTES

Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True)
class MergeFacts:
    """What was written, as merge.json holds it."""

    base: dict[str, str | None]
    adapters: list[dict[str, Any]]
    policy: Policy
    dtype: str
    quantize: str | None  # how the base was stored while the adapter was trained
    tensors: int
    changed: int  # tensors whose bytes are not the base's; all others are byte-identical, or cast to another dtype
    bytes: int
    sha256: str  # weights.WeightFiles.fingerprint of the merged weights
    certificate: dict[str, Any] | None
    versions: dict[str, str]
    graft: dict[str, Any] | None = None  # export.graft.Graft.facts, where it was put back beside other models

    def said(self) -> dict[str, Any]:
        """The fields by name, as merge.json has them; that of a graft where it was one."""
        found = dict(vars(self))
        if self.graft is None:
            del found["graft"]
        return found


def merge_to_folder(
    place: Place,
    out: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    dtype: torch.dtype | None = None,
    policy: Policy = "original",
    graft: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    certify: Callable[[MergedWeights, Path], dict[str, Any]] | None = None,
    beside: Callable[[Path, MergeFacts], None] | None = None,
    on_progress: Progress | None = None,
) -> MergeFacts:
    """Write a complete transformers folder of a base with its adapters merged in; all of it appears at once.

    adapters: folders (of adapters or runs) with their weights in a linear combination; none: the place's own. dtype:
    None keeps each tensor's own. policy: what a delta of a quantized run is added to: the base's weights as they are,
    or as they were dequantized in training. graft: write the multimodal folder that the base is, with the merged
    weights in it, and not a text model's. certify: is given the weights and the finished folder before it appears,
    gives what merge.json says under "certificate", and raises when the folder should not be. beside: writes further
    files.
    Raises: UserError and its children, one line; nothing is left behind.
    """
    merged = merged_weights(place, adapters=adapters, dtype=dtype, policy=policy)
    if merged.place.reward:
        refuse_reward_form(str(merged.place.adapter), "hf", graft=graft)
    grafted = Graft.of(merged, dtype=dtype) if graft else None
    check_out(out, merged.bytes if grafted is None else grafted.bytes)
    facts: list[MergeFacts] = []

    def fill(folder: Path) -> None:
        if grafted is not None:
            grafted.write(folder, on_progress)
            grafted.verify(folder)
        else:
            write_shards(folder, merged.infos, _counted(merged, on_progress), max_shard_bytes=max_shard_bytes)
            write_beside_weights(
                folder,
                place=merged.place,
                dtype=merged.dtype,
                vocab_size=merged.vocab_size,
            )
            verify(merged, folder)
        certificate = certify(merged, folder) if certify is not None else None
        facts.append(_facts(merged, folder, certificate, grafted))
        write_json(folder / FACTS, facts[0].said())
        if beside is not None:
            beside(folder, facts[0])

    commit_model_folder(out, fill)
    return facts[0]


@torch.no_grad()
def merge_into(model: Any, merged: MergedWeights, on_progress: Progress | None = None) -> None:
    """Give a native model of the base, not quantized, the weights of a merge: those that the merged folder would load.

    Its parameters keep their dtype and device; what no adapter touches is not written to.
    """
    parameters = dict(model.named_parameters())
    changed = sorted(merged.changed)
    for done, name in enumerate(changed, start=1):
        made = merged.tensor(name)
        if made.shape == parameters[name].shape:
            parameters[name].copy_(made)
        else:  # the embedding, which the head shares, has grown
            parameters[name].data = made.to(parameters[name])
            model.model.added_rows = None
        if on_progress is not None:
            on_progress(done, len(changed))


def verify(merged: MergedWeights, folder: Path) -> None:
    """Read a merged folder back: all tensors there, as promised, finite, and those untouched equal to the base.

    Raises: UserError naming the first that is not.
    """
    written = WeightFiles.open(folder)
    if written.names != sorted(merged.infos):
        raise UserError("the tensors on the disk are not those that were written; check the disk and run again")
    for name, (dtype, shape) in merged.infos.items():
        found = written.info(name)
        tensor = written.tensor(name)
        good = (found.dtype, found.shape) == (dtype, tuple(shape)) and bool(torch.isfinite(tensor).all())
        if good and name not in merged.changed:
            good = torch.equal(_bytes(tensor), _bytes(merged.tensor(name)))
        if not good:
            raise UserError(f"{name} did not come back from the disk as it was written; check the disk and run again")


def _counted(merged: MergedWeights, on_progress: Progress | None) -> Callable[[str], Tensor]:
    done = 0

    def tensor(name: str) -> Tensor:
        nonlocal done
        made = merged.tensor(name)
        done += 1
        if on_progress is not None:
            on_progress(done, len(merged.infos))
        return made

    return tensor


def _facts(merged: MergedWeights, folder: Path, certificate: dict[str, Any] | None, graft: Graft | None) -> MergeFacts:
    place, contract = merged.place, merged.place.contract
    return MergeFacts(
        base={
            "name": contract.base if contract is not None else place.base.name,
            "revision": contract.revision if contract is not None else place.base.revision,
            "sha256": place.of_base.sha256,
        },
        adapters=[facts_of(adapter) for adapter in merged.adapters],
        policy=merged.policy,
        dtype=dtype_name(merged.dtype),
        quantize=merged.stored.kind if merged.stored is not None else None,
        tensors=len(merged.infos),
        changed=len(merged.changed),
        bytes=merged.bytes,
        sha256=model_weights(folder).fingerprint(),
        certificate=certificate,
        versions=environment.versions(),
        graft=graft.facts() if graft is not None else None,
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
