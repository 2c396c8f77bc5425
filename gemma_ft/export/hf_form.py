"""A transformers folder as a form of an export: a text model alone, or put back in its multimodal original."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemma_ft.build.place import Place
from gemma_ft.build.weights import dtype_name, write_shards
from gemma_ft.export.formats import Bar, ExportStep, sizes_of, weights_of
from gemma_ft.export.graft import Graft
from gemma_ft.export.hf_folder import check_out, commit_model_folder, write_beside_weights
from gemma_ft.export.merge.certificate import BeyondLimit, certify
from gemma_ft.export.merge.merge import merge_to_folder, verify
from gemma_ft.export.merge.merged import MergedWeights
from gemma_ft.export.metadata import ExportMetadata
from gemma_ft.recipe.run_files import FACTS
from gemma_ft.system.limits import MAX_SHARD_BYTES

PROMPTS = 32  # held-out rows that the certificate of a merge compares


class HfForm:
    """A plain transformers folder: the adapter merged in and certified, or the weights as they are."""

    def __init__(
        self, place: Place, metadata: ExportMetadata, out: Path, dtype: torch.dtype | None, graft: bool = False
    ) -> None:
        self.place, self.metadata, self.out, self.dtype = place, metadata, out, dtype
        self.weights = weights_of(place, dtype)
        self.graft = Graft.of(self.weights, dtype=dtype) if graft else None
        if self.graft is not None:
            self.metadata = metadata.grafted(self.graft.original.folder, self.graft.contract)
        check_out(out, self.weights.bytes if self.graft is None else self.graft.bytes)

    def steps(self) -> list[ExportStep]:
        one_file = self.weights.bytes <= MAX_SHARD_BYTES
        files = {"model.safetensors" if one_file else "model-*-of-*.safetensors": self.weights.bytes}
        base, adapter = Path(self.place.base.name).name, self.place.adapter
        what = f"merge {adapter} into {base}" if adapter else f"copy the weights of {base}"
        if self.graft is not None:
            what += f", in the files of {Path(self.graft.original.source.name).name}"
            files = {file: (self.graft.files.folder / file).stat().st_size for file in self.graft.files.shards}
        steps = [
            ExportStep(what, files),
            ExportStep("write what lies beside them", {**sizes_of(self._beside), **({FACTS: None} if adapter else {})}),
        ]
        return [
            *steps,
            *([ExportStep(f"compare with the live model on {PROMPTS} held-out rows", {})] if adapter else []),
        ]

    def write(self, bar: Bar) -> dict[str, Any] | None:
        if self.place.adapter is None:
            commit_model_folder(self.out, partial(self._copy, counted=bar("copy")))
            return None
        try:
            facts = merge_to_folder(
                self.place,
                self.out,
                dtype=self.dtype,
                graft=self.graft is not None,
                certify=partial(certify, prompts=PROMPTS, on_progress=bar("compare")),
                beside=lambda folder, facts: self.metadata.write(folder, "hf", merge=facts.said()),
                on_progress=bar("merge"),
            )
        except BeyondLimit as error:
            raise BeyondLimit(f"{error} (options of gemma-ft merge)", error.certificate) from error
        return facts.said()

    def notes(self) -> list[str]:
        return [*self.metadata.notes, *(self.graft.notes if self.graft is not None else ())]

    def _copy(self, folder: Path, *, counted: Callable[[int, int], None]) -> None:
        if self.graft is not None:
            self.graft.write(folder, counted)
            self.graft.verify(folder)
            self._beside(folder)
            return
        names = list(self.weights.infos)

        def tensor(name: str) -> torch.Tensor:
            counted(names.index(name) + 1, len(names))
            return self.weights.tensor(name)

        write_shards(folder, self.weights.infos, tensor)
        verify(self.weights, folder)
        self._beside(folder)

    def _beside(self, folder: Path) -> None:
        if self.graft is not None:
            self.graft.write_beside(folder)
            merge = None if self.place.adapter is not None else {"graft": self.graft.facts()}
            self.metadata.write(folder, "hf", merge=merge)
            return
        write_beside_weights(
            folder,
            place=self.place,
            dtype=self.weights.dtype,
            vocab_size=self.weights.vocab_size,
        )
        self.metadata.write(folder, "hf", rounded_to=_rounded_to(self.weights))


def _rounded_to(weights: MergedWeights) -> str | None:
    """The dtype that weights are cast to on the way out; None where they stay as they are."""
    kept = set(weights.base.names)  # all but the head that a reward model's adapter brings
    cast = any(dtype != weights.base.info(name).dtype for name, (dtype, _) in weights.infos.items() if name in kept)
    return dtype_name(weights.dtype) if cast else None
