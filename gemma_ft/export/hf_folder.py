"""A plain transformers folder: what lies beside the weights, and how the whole appears at once or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemma_ft.build.contract import asking_encoder, stop_ids_in
from gemma_ft.build.place import Place
from gemma_ft.build.pretrained import tokenizer_of
from gemma_ft.build.weights import dtype_name
from gemma_ft.data.encode.own_template import UnknownTemplate
from gemma_ft.data.encode.tokenizer import ControlIds
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.errors import DiskError, UserError
from gemma_ft.export.card.run_record import read_object
from gemma_ft.families.records import family_of, known_families, text_fields
from gemma_ft.model.config import config_in
from gemma_ft.model.config_file import composite_in
from gemma_ft.model.reward import reward_architecture
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system.files import commit_folder, write_json
from gemma_ft.system.units import byte_size

SPARE_BYTES = 64 * 2**20  # tokenizer, configs, and what a file system takes for itself


def check_out(out: Path, weight_bytes: int) -> None:
    """See whether a new folder of so many bytes of weights can be written at `out`, and leave everything as it is.

    Raises: UserError when something is there already (a link included), when the place cannot be written to or is where
    a run keeps its own files; DiskError when the disk has too little space.
    """
    check_free(out)
    real = Path(os.path.realpath(out))
    for folder in (real, *real.parents):
        run = RunFiles(folder.parent)
        if folder in run.folders and run.recipe.is_file():
            raise UserError(
                f"{out}: a run keeps its own files in {folder}; choose another --out, such as {folder.parent}/merged"
            )
    try:
        parent = next(path for path in out.absolute().parents if path.exists())
        if not parent.is_dir():
            raise UserError(f"{out}: {parent} is a file; choose another --out")
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose another --out") from error
    if free < weight_bytes + SPARE_BYTES:
        needed, left = (byte_size(size, "GB", ".3g") for size in (weight_bytes + SPARE_BYTES, free))
        raise DiskError(f"{out}: needs {needed}, its disk has {left} left; free some, or choose another --out")


def check_free(out: Path) -> None:
    """Raises UserError when something is at `out`, a link included."""
    if out.is_symlink() or out.exists():
        raise _taken(out)


def _taken(out: Path) -> UserError:
    return UserError(f"{out}: exists already; choose another --out, or move it away")


def commit_model_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Make the new folder `out` appear at once and complete; `fill` writes into a staging folder beside it.

    Whatever `fill` raises, nothing stays behind. Raises: DiskError when the disk fills up; UserError when `out` cannot
    be written, or appeared meanwhile: it is left alone.
    """
    try:
        commit_folder(out, fill, manifest=False, replace=False, go_on="run again")
    except FileExistsError as error:
        raise _taken(out) from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from error


def write_beside_weights(
    folder: Path,
    *,
    place: Place,
    dtype: torch.dtype,
    vocab_size: int,
) -> None:
    """Write config.json, generation_config.json, the tokenizer and gemma_ft.json into `folder`.

    place: whose base's config.json is taken over, whose tokenizer it is, and what was trained: the contract's chat
    template is written, and gemma_ft.json says that nothing is quantized any more. Without one the tokenizer keeps its
    own template and there is no gemma_ft.json. dtype, vocab_size: of the weights.
    Raises: UserError when the tokenizer is not the one of the contract.
    """
    base, contract, tokenizer = place.of_base.folder, place.contract, tokenizer_of(place)
    try:
        stop_ids = asking_encoder(tokenizer, place.folder, contract, base).stop_ids
    except UnknownTemplate:  # copied as it is
        stop_ids = list(dict.fromkeys([tokenizer.eos_token_id, *stop_ids_in(base)]))
    control = ControlIds.from_tokenizer(tokenizer)
    fields = config_fields(base, dtype) | {"vocab_size": vocab_size}
    if place.reward:
        write_json(folder / "config.json", fields | reward_fields(place, control))
    else:
        write_json(folder / "config.json", fields)
        write_json(folder / "generation_config.json", generation_fields(base, control, stop_ids))
    save_tokenizer(tokenizer, folder, system_policy=contract.system if contract is not None else None)
    if contract is not None:
        replace(contract, quantize=None, adapter_sha256=None).write(folder)


def config_fields(base: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json with the dtype of the new weights, the family's architecture, and a tied head.

    Raises: UserError when it is not there, or not a plain Gemma's.
    """
    path = base / "config.json"
    said = _json_object(path)
    fields = dict(text_fields(said))
    if composite_in(base) is not None:  # its text_config leaves out what is the class's own, and the ids beside it
        fields = config_in(base).to_dict()
    family = family_of(fields.get("model_type"))
    if family is None:
        raise UserError(f"{path}: model_type {fields.get('model_type')!r} is not {known_families('or')}")
    if "quantization_config" in {**said, **fields}:
        raise UserError(f"{path}: these weights are quantized already; name the base that they were made from")
    name = dtype_name(dtype)
    former = {"torch_dtype": name} if "torch_dtype" in fields else {}  # what libraries read before "dtype"
    return {**fields, **former, "architectures": [family.architecture], "dtype": name, "tie_word_embeddings": True}


def reward_fields(place: Place, control: ControlIds) -> dict[str, Any]:
    """What config.json says of a reward model beside its base's: transformers finds the last token by the pad id."""
    name = reward_architecture(place.of_base.config.model_type)
    return {
        "architectures": [name],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": control.pad,
    }


def generation_fields(base: Path, control: ControlIds, stop_ids: list[int]) -> dict[str, Any]:
    """The base's generation_config.json (where it has one) with the ids at which an answer ends, its own among them."""
    path = base / "generation_config.json"
    own = _json_object(path) if path.is_file() else {}
    ids = {"bos_token_id": control.bos, "pad_token_id": control.pad}
    return {**own, **{key: id for key, id in ids.items() if own.get(key) is None}, "eos_token_id": stop_ids}


def _json_object(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if found is None:
        raise UserError(f"{path}: cannot be read; fetch the folder again")
    return found
