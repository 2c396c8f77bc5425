"""Safetensors folders, one tensor at a time: where a model's files are, what is in them, and how new ones are written.

Nothing here opens any other form of weights: pickles are refused by name, before they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.build.located import PICKLES, refuse_file
from gemma_ft.errors import UserError
from gemma_ft.system.limits import MAX_SHARD_BYTES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one tensor in every Gemma
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What a fingerprint reads of a large tensor: training, quantizing or casting changes nearly every element, so that a
# few blocks tell two bases apart without reading 54 GB.
_SAMPLE_BLOCKS, _BLOCK_BYTES = 64, 4096


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file describes it: the `name` that it has there; `start` is the place of its first byte in it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int
    name: str


Rename = Callable[[str], str | None]  # the name of a tensor in its file -> here; None: it is not asked for


class WeightFiles:
    """The tensors of a model or adapter folder, from one or several safetensors files, read one at a time.

    `left`: the tensors of its files that were not asked for, by their names there; only the file of one whose shard was
    not opened.
    """

    def __init__(
        self, folder: Path, entries: Mapping[str, TensorInfo], left: Mapping[str, TensorInfo | Path] | None = None
    ) -> None:
        self.folder, self.left = folder, dict(left or {})
        self._entries = dict(sorted(entries.items()))
        self.names = list(self._entries)

    @classmethod
    def open(cls, folder: Path, stem: str = "model", rename: Rename | None = None) -> WeightFiles:
        """The weights of `folder`: `stem`.safetensors, or the shards that `stem`.safetensors.index.json names.

        Only headers are read, and those of shards in which `rename` leaves nothing are not. Raises: UserError in one
        line for files that are missing, cut short, damaged, pickles or outside the folder, for tensors that the index
        names and no file holds, and for two that `rename` gives one name.
        """
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if index.is_file() and single.is_file():  # libraries do not agree on which of them they open
            raise UserError(f"{folder}: holds {single.name} and {index.name}; move away the one that is not the model")
        if index.is_file() or single.is_file():
            return cls._renamed(folder, _indexed(folder, index, rename) if index.is_file() else _header(single), rename)
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{folder}/{pickles[0]}: a pickle can run code when it is opened and is refused; "
                "convert it to safetensors where it was made"
            )
        for file in sorted(folder.glob("*.gguf")):
            refuse_file(file)
        raise UserError(f"{folder}: there is no {stem}.safetensors in it, nor an index of shards")

    @classmethod
    def _renamed(cls, folder: Path, found: Mapping[str, TensorInfo | Path], rename: Rename | None) -> WeightFiles:
        entries: dict[str, TensorInfo] = {}
        left: dict[str, TensorInfo | Path] = {}
        for name, info in found.items():
            native = name if rename is None else rename(name)
            if isinstance(info, Path) or native is None:
                left[name] = info
                continue
            if native in entries:
                raise UserError(
                    f"{folder}: {entries[native].name} and {name} are one tensor of the model, twice; fetch it again"
                )
            entries[native] = info
        return cls(folder, entries, left)

    @property
    def shards(self) -> dict[str, list[str]]:
        """File name -> the names of its tensors, in the order they lie in it (safetensors sorts them)."""
        found: dict[str, list[str]] = {}
        for name, info in sorted(self._entries.items(), key=lambda item: (item[1].file.name, item[1].start)):
            found.setdefault(info.file.name, []).append(name)
        return found

    def info(self, name: str) -> TensorInfo:
        """Where and what a tensor is. Raises: KeyError."""
        return self._entries[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name; none is read."""
        return {name: self.info(name).shape for name in self.names}

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, in the dtype of its file."""
        try:
            with safe_open(str(self._entries[name].file), framework="pt") as file:
                return file.get_tensor(self._entries[name].name)
        except SafetensorError as error:
            raise UserError(f"{self._entries[name].file}: cannot be read: {error}; fetch it again") from error

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, dtypes, shapes and bytes of all tensors, the same however they are split into
        files.

        Of a tensor above 256 KiB, 64 blocks of 4 KiB are read, evenly spaced. It tells bases apart that differ by
        training, quantizing or casting; it does not prove that no single byte was changed.
        """
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            paths = {info.file for info in self._entries.values()}
            opened = {path: stack.enter_context(path.open("rb")) for path in paths}
            for name, info in self._entries.items():
                digest.update(json.dumps([name, str(info.dtype), info.shape]).encode())
                file = opened[info.file]
                for start, size in _blocks(info.bytes):
                    file.seek(info.start + start)
                    digest.update(file.read(size))
        return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, from whatever device they are on."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, onto the CPU."""
    return load_file(str(path))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as config.json has it: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")


def write_shards(
    folder: Path,
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write tensors as model.safetensors, or as numbered shards with an index; returns the names of the files.

    `infos` says what will come (name -> dtype, shape), in the order of writing; `tensors` makes each one when its shard
    is written, so that memory holds one shard at most.
    """

    def save(path: Path, names: Sequence[str]) -> None:
        made = {name: _as_promised(tensors(name), name, infos[name]) for name in names}
        save_file(made, str(path), metadata={"format": "pt"})

    return sharded(folder, infos, save, max_shard_bytes=max_shard_bytes)


def sharded(
    folder: Path,
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    save: Callable[[Path, Sequence[str]], None],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Let `save` write the tensors of `infos` as model.safetensors, or as numbered shards, whose index is written here;
    returns the names of the files.
    """
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, (dtype, shape) in infos.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    files, places = [], {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save(folder / file, names)
        files.append(file)
        places.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _as_promised(tensor: Tensor, name: str, promised: tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
    assert (tensor.dtype, tuple(tensor.shape)) == (promised[0], tuple(promised[1])), f"{name} is not as announced"
    return tensor.detach().cpu().contiguous()


def _blocks(size: int) -> Iterable[tuple[int, int]]:
    """(start, bytes) of what is read of a tensor of `size` bytes: all of a small one, else evenly spaced blocks."""
    if size <= _SAMPLE_BLOCKS * _BLOCK_BYTES:
        return [(0, size)]
    stride = (size - _BLOCK_BYTES) / (_SAMPLE_BLOCKS - 1)
    return [(int(number * stride), _BLOCK_BYTES) for number in range(_SAMPLE_BLOCKS)]


def _indexed(folder: Path, index: Path, rename: Rename | None) -> dict[str, TensorInfo | Path]:
    """Tensor by the name that the index gives it; of shards of which nothing is asked for the file alone."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read as an index of shards; fetch the folder again") from error
    asked = {file for name, file in wanted.items() if rename is None or rename(name) is not None}
    held: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(wanted.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise UserError(f"{index}: names {file!r}, which is not a file of this folder; do not trust this folder")
        if Path(file).suffix != ".safetensors":
            raise UserError(f"{index}: names {file!r}; only .safetensors files are opened")
        if file not in asked:
            continue
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: missing, though {index.name} names it; fetch the folder again")
        held[file] = _header(folder / file)
    lost = sorted(name for name, file in wanted.items() if file in held and name not in held[file])
    if lost:
        raise UserError(f"{folder / wanted[lost[0]]}: has no tensor {lost[0]}, though {index.name} says so")
    return {name: held[file][name] if file in held else folder / file for name, file in wanted.items()}


def _header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file describes, after a look at whether all of their bytes are there.

    The library opens the file first: it checks offsets, overlaps and the file's length.
    """
    try:
        with safe_open(str(path), framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {entry['dtype']}, which is not supported; use bf16 or float32"
            )
        found[name] = TensorInfo(
            path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + int(start), int(end) - int(start), name
        )
    return found
