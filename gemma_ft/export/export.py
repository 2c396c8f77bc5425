"""`gemma-ft export` in reading order: look, write, upload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

from gemma_ft.build.place import place_of
from gemma_ft.build.reward import refuse_reward_form
from gemma_ft.data.encode.tokenizer import HUB_ID
from gemma_ft.errors import UserError
from gemma_ft.export.form_names import FormName, GgufType
from gemma_ft.export.formats import AdapterForm, ExportStep, Form, GgufForm
from gemma_ft.export.gguf_check import check_for_llama_cpp
from gemma_ft.export.hf_folder import check_free
from gemma_ft.export.hf_form import HfForm
from gemma_ft.export.merge.certified import DTYPES
from gemma_ft.export.metadata import ExportMetadata
from gemma_ft.export.push import check_name, push
from gemma_ft.system.observer import SILENT, Observer, callbacks
from gemma_ft.system.units import byte_size


@dataclass(frozen=True)
class ExportOptions:
    """What a user asks of an export; the names are those of the options."""

    to: FormName
    out: Path
    gguf_type: GgufType | None = None
    dtype: str | None = None
    base_id: str | None = None
    push: str | None = None
    public: bool = False
    graft: bool = False

    def check(self) -> None:
        """Raises UserError for options that do not go together, before anything is read."""
        if self.gguf_type is not None and self.to != "gguf":
            raise UserError(f"--gguf-type: goes with --to gguf, not with --to {self.to}")
        if self.dtype is not None and self.to != "hf":
            also = "; --gguf-type says how a GGUF file stores its weights" if self.to == "gguf" else ""
            raise UserError(f"--dtype: goes with --to hf, not with --to {self.to}{also}")
        if self.graft and self.to != "hf":
            raise UserError(f"--graft: goes with --to hf, not with --to {self.to}")
        if self.base_id is not None and self.to != "adapter":
            raise UserError(f"--base-id: goes with --to adapter, not with --to {self.to}")
        if self.base_id is not None and not HUB_ID.fullmatch(self.base_id):
            raise UserError(f"--base-id {self.base_id}: expected OWNER/NAME, as on the hub")
        if self.public and self.push is None:
            raise UserError("--public: goes with --push OWNER/NAME")
        if self.push is not None:
            check_name(self.push)
        if self.push is not None and self.out.suffix == ".gguf":
            raise UserError(
                f"--push: {self.out.name} would go without model card and notice; name a folder: --out {self.out.stem}"
            )


@dataclass(frozen=True)
class Export:
    """A model in another form, which is written or will be."""

    options: ExportOptions
    form: Form
    facts: dict[str, Any] | None = None  # of its merge, where there was one

    @property
    def steps(self) -> list[ExportStep]:
        """What is done for it: the files that are written, and their upload."""
        steps = self.form.steps()
        if self.options.push is None:
            return list(steps)
        sizes = [size for step in steps for size in step.files.values()]
        total = byte_size(sum(size or 0 for size in sizes), None, ".1f")
        upload = ExportStep(f"upload {len(sizes)} files, {total}, to {self.options.push} ({self.visibility})", {})
        return [*steps, upload]

    @property
    def files(self) -> list[Path]:
        """Those that were written, by name."""
        if isinstance(self.form, GgufForm) and self.form.alone:
            return [self.form.out.parent / self.form.modelfile, self.form.out]
        return sorted(self.form.out.iterdir())

    @property
    def visibility(self) -> str:
        """Who sees what is uploaded."""
        return "public" if self.options.public else "private"


def plan_export(source: str, options: ExportOptions) -> Export:
    """What an export would write; nothing is. Raises: UserError and its children in one line."""
    options.check()
    check_free(options.out)  # before tokenizers and weights are read
    return Export(options, _form(source, options))


def export_model(source: str, options: ExportOptions, *, observer: Observer = SILENT) -> Export:
    """Write a model in another form. Raises: UserError and its children in one line; nothing half-written is left."""
    planned = plan_export(source, options)
    with callbacks(observer) as on_progress:
        return replace(planned, facts=planned.form.write(on_progress))


def upload(export: Export, *, api: Any = None) -> str:
    """Upload what was written to where the options say; returns its address. api: an HfApi. Raises: UserError."""
    assert export.options.push is not None
    names = [path.name for path in export.files]
    return push(export.form.out, names, export.options.push, public=export.options.public, api=api)


def _form(source: str, options: ExportOptions) -> Form:
    place = place_of(source)
    if place.reward:
        refuse_reward_form(source, options.to, graft=options.graft)
    if options.to == "gguf":
        check_for_llama_cpp(place.of_base.config)  # before tokenizer and weights are read
    metadata = ExportMetadata.of(place, options.push or options.out.name, options.base_id)
    match options.to:
        case "gguf":
            return GgufForm(place, metadata, options.out, options.gguf_type)
        case "adapter":
            if options.push is not None and options.base_id is None and Path(place.base.name).is_absolute():
                raise UserError(
                    f"--push: the adapter's base is the local folder {place.base.name}, which nobody else has; name "
                    "the same weights on the hub with --base-id OWNER/NAME, or use --to hf"
                )
            return AdapterForm(place, metadata, options.out, options.base_id)
        case "hf":
            dtype = DTYPES[options.dtype] if options.dtype is not None else None
            return HfForm(place, metadata, options.out, dtype, graft=options.graft)
    assert_never(options.to)
