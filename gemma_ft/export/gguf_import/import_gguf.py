"""`gemma-ft import` in reading order: look at the file, plan the folder, write it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from gemma_ft.build.contract import Contract
from gemma_ft.build.pretrained import load_tokenizer
from gemma_ft.build.weights import dtype_name
from gemma_ft.data.encode.tokenizer import ContentEncoder
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export.card.license import GEMMA_NOTICE, POLICY_URL, is_tiny
from gemma_ft.export.gguf_file import CONTRACT_KEY
from gemma_ft.export.gguf_import.config_of_file import FoundConfig, config_of, family_of_file
from gemma_ft.export.gguf_import.tokenizer_of_file import FileTokenizer, tokenizer_of_file
from gemma_ft.export.gguf_import.weights_of_file import FileWeights, weights_of_file
from gemma_ft.export.gguf_reader import GgufFile, read_gguf
from gemma_ft.export.hf_folder import check_free, check_out, commit_model_folder
from gemma_ft.export.metadata import CARD, NOTICE
from gemma_ft.families.family import Family
from gemma_ft.families.records import PRESETS, TINY
from gemma_ft.system.files import file_hash, write_json
from gemma_ft.system.observer import SILENT, Observer, callbacks

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Import:
    """A GGUF file that was, or will be, made a transformers folder."""

    file: GgufFile
    family: Family
    config: FoundConfig
    weights: FileWeights
    tokenizer: FileTokenizer
    contract: Contract | None

    @property
    def bytes(self) -> int:
        """What the weights weigh in the folder."""
        return self.weights.bytes

    def notes(self) -> list[str]:
        """What a user should know of it, in lines."""
        notes = list(self.config.notes)
        rounding = self.weights.rounding
        if rounding.largest:
            notes.append(
                f"rounded to bf16: relative to the file's numbers at most {rounding.largest:.2g}, "
                f"on average {rounding.mean:.2g}"
            )
        if not self.tokenizer.has_template:
            notes.append("the file has no chat template: taken for a pretrained model, which does not answer in turns")
        if CONTRACT_KEY in self.file.fields and self.contract is None:
            notes.append(f"its {CONTRACT_KEY} does not fit its chat template, and was left out")
        return notes


def plan_import(path: Path, out: Path, *, dtype: str | None = None, config: Path | None = None) -> Import:
    """What an import would write; nothing is. Raises: UserError and its children in one line."""
    check_free(out)
    file = read_gguf(path)
    family = family_of_file(file)
    found = config_of(file, family, config)
    weights = weights_of_file(file, family, found.config, found.name, DTYPES[dtype] if dtype is not None else None)
    check_out(out, weights.bytes)
    tokenizer = tokenizer_of_file(file, family, found.config.vocab_size)
    return Import(file, family, found, weights, tokenizer, _contract(file))


def import_gguf(
    path: Path, out: Path, *, dtype: str | None = None, config: Path | None = None, observer: Observer = SILENT
) -> Import:
    """Write the model of a GGUF file as the new transformers folder `out`, which appears whole or not at all.

    dtype: float32 or bf16; None: as in the file where that is F32 or BF16, else float32. config: the model's own
    config.json, for sizes that no record has.
    Raises: UserError and its children in one line; nothing half-written is left.
    """
    planned = plan_import(path, out, dtype=dtype, config=config)
    done: list[Import] = []
    with callbacks(observer) as on_progress:

        def fill(folder: Path) -> None:
            planned.weights.write(folder, on_progress("import"))
            done.append(_write_beside(planned, folder, out.name))

        commit_model_folder(out, fill)
    return done[0]


def _write_beside(planned: Import, folder: Path, name: str) -> Import:
    """Everything but the weights; gives what became of the contract."""
    tokenizer = planned.tokenizer.tokenizer
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    fields = {**planned.config.fields, **ids, "dtype": dtype_name(planned.weights.dtype)}
    fields.pop("torch_dtype", None)
    write_json(folder / "config.json", fields)
    write_json(folder / "generation_config.json", {**ids, "eos_token_id": planned.tokenizer.stop_ids})
    tokenizer.name_or_path = str(folder)
    save_tokenizer(tokenizer, folder, system_policy=None)
    contract = planned.contract
    if contract is not None:
        try:
            opened = load_tokenizer(folder)  # the file's own, whatever a folder has besides: tokens without a row
            contract = replace(contract, tokenizer_sha256=ContentEncoder(opened).sha256)
            contract.encoder(opened, folder)
            contract.write(folder)
        except UserError:
            contract = None
    tiny = is_tiny(planned.config.config)
    (folder / CARD).write_text(note_of(planned, name), encoding="utf-8")
    if not tiny:
        (folder / NOTICE).write_text(
            f"{GEMMA_NOTICE}\n\n"
            "The numbers in this folder were read from a GGUF file; where it was quantized, they are not the published "
            "ones.\n"
            f"Whoever uses or passes them on is bound by these terms and by the Prohibited Use Policy, {POLICY_URL}\n",
            encoding="utf-8",
        )
    return replace(planned, contract=contract)


def _contract(file: GgufFile) -> Contract | None:
    """The contract of training that travels in files that gemma-ft wrote."""
    text = file.fields.get(CONTRACT_KEY)
    if not isinstance(text, str):
        return None
    try:
        return TypeAdapter(Contract).validate_json(text, strict=True)
    except ValidationError:
        return None


def note_of(planned: Import, name: str) -> str:
    """The README.md of the folder: what it is, of which file, and under which terms."""
    file, fields = planned.file, planned.file.fields
    kinds: dict[str, int] = {}
    for one in planned.weights.tensors:
        kinds[one.stored.type] = kinds.get(one.stored.type, 0) + 1
    stored = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
    license = planned.family.license if not is_tiny(planned.config.config) else None
    tag, link = license or ("apache-2.0", PRESETS[TINY].weights)
    turns = (
        "The file has a chat template, which lies here too."
        if planned.tokenizer.has_template
        else "The file has no chat template: it is taken for a pretrained model, which continues a text and does not "
        "answer in turns. Tune it on chats first."
    )
    terms = (
        f"{GEMMA_NOTICE} ({link}), and its Prohibited Use Policy ({POLICY_URL})."
        if license is not None
        else "The tiny Gemma of gemma-ft: Apache License 2.0, no weights of Google's."
    )
    dtype = dtype_name(planned.weights.dtype)
    return (
        f"---\nlicense: {tag}\nlibrary_name: transformers\n---\n\n# {name}\n\n"
        f"A {planned.family.label} ({fields.get('general.name', 'without a name')}), read from a GGUF file by "
        f"`gemma-ft import` and written in {dtype}.\n\n"
        f"- file: `{file.path.name}`, sha256 `{file_hash(file.path)}`\n"
        f"- stored there: {stored} tensors. What quantization took away is not there any more.\n"
        f"- config.json: from {Path(planned.config.name).name}\n"
        f"- {turns}\n\n## Terms\n\n{terms}\n"
    )
