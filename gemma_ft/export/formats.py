"""The forms of an export, each with what it would write and the writing itself: all of it appears at once, or none.
A transformers folder is in hf_form.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from gemma_ft.adapters.class_names import rename_folder
from gemma_ft.adapters.kinds import ADAPTER_WEIGHTS
from gemma_ft.build.place import Place
from gemma_ft.build.weights import EMBEDDING
from gemma_ft.errors import UserError
from gemma_ft.export.adapter_folder import vllm_notes, write_adapter
from gemma_ft.export.form_names import GgufType
from gemma_ft.export.gguf_chat import chat_notes
from gemma_ft.export.gguf_file import plan_gguf, write_gguf
from gemma_ft.export.gguf_reader import gguf_library
from gemma_ft.export.gguf_tokenizer import read_vocabulary, token_count
from gemma_ft.export.hf_folder import check_free, check_out, commit_model_folder
from gemma_ft.export.merge.merged import MergedWeights, merged_weights
from gemma_ft.export.metadata import ExportMetadata
from gemma_ft.export.modelfile import modelfile
from gemma_ft.families.records import FAMILIES
from gemma_ft.model.config_file import composite_in

AS_STORED: dict[torch.dtype, GgufType] = {torch.bfloat16: "bf16", torch.float16: "f16"}
Bar = Callable[[str], Callable[[int, int], None]]  # what is being done -> a callback of how far it is


@dataclass(frozen=True)
class ExportStep:
    """Something an export does, and the files that come of it with their bytes (None: not known before)."""

    what: str
    files: Mapping[str, int | None]


class Form(Protocol):
    """One way of writing a model. Making one checks everything that can be known before anything is written."""

    out: Path

    def steps(self) -> list[ExportStep]:
        """What `write` would do."""

    def write(self, bar: Bar) -> dict[str, Any] | None:
        """Do it; returns the facts of a merge, where there was one."""

    def notes(self) -> list[str]:
        """What a user should know of the result."""


class AdapterForm:
    """A PEFT folder, its base named so that others can find it."""

    def __init__(self, place: Place, metadata: ExportMetadata, out: Path, base_id: str | None) -> None:
        if place.of_adapter is None:
            raise UserError(f"{place.base.name}: is a whole model without an adapter; use --to hf")
        self.place, self.adapter, self.metadata, self.out, self.base_id = (
            place,
            place.of_adapter,
            metadata,
            out,
            base_id,
        )
        self.bytes = (self.adapter.folder / ADAPTER_WEIGHTS).stat().st_size
        check_out(out, self.bytes)

    def steps(self) -> list[ExportStep]:
        copied = ExportStep(f"copy {self.adapter.folder}", {ADAPTER_WEIGHTS: self.bytes})
        return [copied, ExportStep("write what lies beside it", sizes_of(self._beside))]

    def write(self, bar: Bar) -> dict[str, Any] | None:
        commit_model_folder(self.out, self._write)
        return None

    def notes(self) -> list[str]:
        notes = [] if self.place.reward else vllm_notes(self.adapter.fields, self.adapter.weights.names)
        notes += self.metadata.notes
        if self.base_id is None and Path(self.place.base.name).is_absolute():
            notes.append(
                f"the base is the local folder {self.place.base.name}, which nobody else can resolve; "
                "--base-id OWNER/NAME names the same weights on the hub"
            )
        return notes

    def _write(self, folder: Path) -> None:
        self._beside(folder)
        shutil.copyfile(self.adapter.folder / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        composite = composite_in(self.place.of_base.folder)
        if composite is not None and not self.adapter.renamed:
            rename_folder(folder, composite)

    def _beside(self, folder: Path) -> None:
        local, contract = Path(self.place.base.name).is_absolute(), self.place.contract
        write_adapter(self.place, folder, base_id=self.base_id)
        self.metadata.write(folder, "adapter")
        if local and self.base_id is None and contract is not None:
            contract.write(folder)  # like adapter_config.json, for this machine


class GgufForm:
    """One GGUF file with a Modelfile: `out` is that file, or a new folder for both and the metadata."""

    def __init__(self, place: Place, metadata: ExportMetadata, out: Path, kind: GgufType | None) -> None:
        gguf_library()
        self.place, self.metadata, self.out, self.encoder = place, metadata, out, metadata.encoder
        files = place.of_base.weights
        half = torch.float16 in {files.info(name).dtype for name in files.names}  # no dtype to compute in, but to store
        self.weights = weights_of(place, torch.float32 if place.adapter or half else None)  # rounded once, when stored
        self.stored = AS_STORED.get(self.weights.base.info(EMBEDDING).dtype, "f32")
        tokenizer, composite = self.encoder.tokenizer, FAMILIES[self.weights.config.model_type].composite
        self.plan = plan_gguf(self.weights, kind or self.stored, tokens=token_count(tokenizer))
        check_out(out, self.plan.bytes)
        soft = composite.soft_tokens if composite is not None else ()
        self.vocabulary = read_vocabulary(tokenizer, rows=self.plan.config.vocab_size, soft=soft)
        self.alone = out.suffix == ".gguf"
        self.file = out.name if self.alone else f"{out.name}-{self.plan.kind}.gguf"
        taken = self.alone and (out.parent / "Modelfile").exists()
        self.modelfile = f"{out.stem}.Modelfile" if taken else "Modelfile"
        if taken:
            check_out(out.parent / self.modelfile, 0)

    def steps(self) -> list[ExportStep]:
        what = f"merge {self.place.adapter} into" if self.place.adapter else "convert"
        return [
            ExportStep(f"{what} {Path(self.place.base.name).name} as {self.plan.kind}", {self.file: self.plan.bytes}),
            ExportStep(
                "write what lies beside it", {name: len(text.encode()) for name, text in sorted(self._texts().items())}
            ),
        ]

    def write(self, bar: Bar) -> dict[str, Any] | None:
        fill = partial(self._fill, counted=bar("write"))
        if not self.alone:
            commit_model_folder(self.out, fill)
            return None
        parent = self.out.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{self.out.name}.", dir=parent) as room:
                self._commit_files(Path(room) / "export", fill)
        except OSError as error:
            raise UserError(
                f"{self.out}: cannot be written: {error.strerror or error}; choose another --out"
            ) from error
        return None

    def _commit_files(self, staged: Path, fill: Callable[[Path], None]) -> None:
        """Fill folder `staged`, then move its two files to where they belong."""
        try:
            commit_model_folder(staged, fill)
        except UserError as error:
            raise type(error)(str(error).replace(str(staged), str(self.out))) from error
        names = (self.modelfile, self.file)  # the model last: where it is, all of it is
        for name in names:
            check_free(self.out.parent / name)
        for name in names:
            os.replace(staged / name, self.out.parent / name)

    def notes(self) -> list[str]:
        notes = chat_notes(self.encoder)
        if self.place.adapter is not None:
            adapter = shlex.quote(str(self.place.adapter))
            notes.append(f"no certificate: gemma-ft merge {adapter} --out DIR, then export DIR, gives one")
        if ends := self.vocabulary.ends_by_text():
            notes.append(
                f"llama.cpp takes {', '.join(ends)} for the end of an answer, whatever the file says; it was text in "
                "training, and an answer that holds it stops there"
            )
        return notes

    def _fill(self, folder: Path, *, counted: Callable[[int, int], None]) -> None:
        contract = self.place.contract
        write_gguf(
            self.plan,
            self.weights,
            self.encoder.tokenizer,
            self.vocabulary,
            folder / self.file,
            name=self.metadata.name.rpartition("/")[2].removesuffix(".gguf"),
            license=self.metadata.terms.license,
            contract=replace(contract, base=self.metadata.base, quantize=None) if contract is not None else None,
            encoder=self.encoder,
            on_progress=counted,
        )
        for name, text in self._texts().items():
            (folder / name).write_text(text, encoding="utf-8")

    def _texts(self) -> dict[str, str]:
        """What lies beside the GGUF file, by name."""
        texts = {self.modelfile: modelfile(self.file, self.encoder, notice=self.metadata.terms.notice)}
        if self.alone:
            return texts
        contract = replace(self.place.contract, quantize=None) if self.place.contract is not None else None
        rounded_to = None if self.plan.kind == self.stored else self.plan.kind
        return texts | self.metadata.texts("gguf", contract, file=self.file, rounded_to=rounded_to)


def weights_of(place: Place, dtype: torch.dtype | None) -> MergedWeights:
    """The weights of a place, its adapter merged in where it has one, each tensor in `dtype` (None: its own)."""
    return merged_weights(place, dtype=dtype) if place.adapter is not None else MergedWeights(place, [], dtype=dtype)


def sizes_of(fill: Callable[[Path], None]) -> dict[str, int | None]:
    """The files that `fill` writes and their bytes; they are written to a folder of the system's and removed again."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
