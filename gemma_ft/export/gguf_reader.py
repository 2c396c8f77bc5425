"""The header of a GGUF file, each number of it held against the bytes that are there: a damaged one costs neither
memory nor time.

Source: ggml docs/gguf.md. The gguf package's own reader follows whatever counts a file claims.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from gemma_ft.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY, USUAL_ALIGNMENT = "general.alignment", 32
MOST_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
BOOL, STRING, ARRAY = 7, 8, 9  # numbers of types of values; the others are plain numbers, as numpy writes them:
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip
LEAST_OF_FIELD, LEAST_OF_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes of the shortest that there can be


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file has it: shape as torch says it, and where its bytes lie. type: by gguf's name."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was looked through: metadata by key (lists of numbers as arrays), tensors by name, and all of
    its bytes (mapped, not read).
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]
    data: np.ndarray

    def rows(self, tensor: StoredTensor, at_once: int) -> Iterator[np.ndarray]:
        """A tensor in float32, some `at_once` elements at a time, as [rows, columns]."""
        gguf = gguf_library()
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape) // columns
        raw = self.data[tensor.start : tensor.start + tensor.bytes].reshape(rows, -1)
        step = max(1, at_once // columns)
        for first in range(0, rows, step):
            block = np.ascontiguousarray(raw[first : first + step])
            yield gguf.quants.dequantize(block, gguf.GGMLQuantizationType[tensor.type]).reshape(-1, columns)


def gguf_library() -> ModuleType:
    """The gguf package. Raises: UserError when it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise UserError("--to gguf needs the package gguf; install it with: pip install 'gemma-ft[gguf]'") from error


def read_gguf(path: Path) -> GgufFile:
    """Look through a file's header. Raises: UserError in one line for what is no whole GGUF file of our byte order."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise UserError(f"{path}: no GGUF file: it does not begin with {MAGIC.decode()}")
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _Header(path, data).read()


class _Header:
    """Reads from the beginning of the mapped bytes on."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)
        self.view = memoryview(data.data)  # of which a slice costs a tenth of an array's

    def read(self) -> GgufFile:
        self._check_version()
        tensors, fields = self._count(LEAST_OF_TENSOR, "tensors", ahead=8), self._count(LEAST_OF_FIELD, "keys")
        found: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string("a key")
            if key in found:
                self._damaged(f"has {key} twice")
            found[key] = self._value(key)
        infos = [self._tensor() for _ in range(tensors)]
        alignment = found.get(ALIGNMENT_KEY, USUAL_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            self._damaged(f"{ALIGNMENT_KEY} {alignment!r} is no multiple of 8")
        begin = -(-self.at // alignment) * alignment
        return GgufFile(self.path, found, self._placed(infos, begin, alignment), self.data)

    def _check_version(self) -> None:
        (version,) = self._unpack("<I", "its version")
        if version & 0xFFFF == 0:
            raise UserError(f"{self.path}: a big-endian GGUF file; convert the model for little-endian machines")
        if version not in VERSIONS:
            raise UserError(
                f"{self.path}: version {version} of GGUF; versions 2 and 3 are read, convert the model again"
            )

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], begin: int, alignment: int
    ) -> dict[str, StoredTensor]:
        """Tensors by name, with where they lie in the file. Raises: UserError where that cannot be."""
        found: dict[str, StoredTensor] = {}
        for name, shape, number, offset in infos:
            kind, size = self._size(name, shape, number)
            if name in found:
                self._damaged(f"has {name} twice")
            if offset % alignment:
                self._damaged(f"{name} does not begin at a multiple of {alignment}")
            found[name] = StoredTensor(name, shape, kind, begin + offset, size)
        end = begin
        for one in sorted(found.values(), key=lambda tensor: tensor.start):
            if one.start < end:
                self._damaged(f"{one.name} lies over another tensor")
            end = one.start + one.bytes
            if end > len(self.data):
                self._cut_short(one.name)
        return found

    def _size(self, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
        """The name of a type by its number, and the bytes of a tensor of it."""
        gguf = gguf_library()
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise UserError(f"{self.path}: {name} is of type {number}, which the package gguf does not know") from error
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            self._damaged(f"{name} has rows of {shape[-1]}, which {kind.name} cannot cut into blocks of {block}")
        return kind.name, math.prod(shape) // block * size

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and place behind the header."""
        name = self._string("a tensor's name")
        (dimensions,) = self._unpack("<I", name)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            self._damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed(self._unpack(f"<{dimensions}Q", name)))
        if min(shape) < 1 or math.prod(shape) >= 2**48:
            self._damaged(f"{name} has the shape {list(shape)}")
        number, offset = self._unpack("<IQ", name)
        return name, shape, number, offset

    def _value(self, key: str) -> Any:
        (kind,) = self._unpack("<I", key)
        if kind == STRING:
            return self._string(key)
        if kind != ARRAY:
            return self._numbers(key, kind, 1)[0].item()
        (kind,) = self._unpack("<I", key)
        if kind != STRING:
            (count,) = self._unpack("<Q", key)
            return self._numbers(key, kind, count)
        return [self._string(key) for _ in range(self._count(8, f"texts in {key}"))]

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in NUMBERS:
            self._damaged(f"{key} has a value of type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _string(self, what: str) -> str:
        (length,) = self._unpack("<Q", what)
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError:
            self._damaged(f"{what} is no text in UTF-8")

    def _count(self, least: int, what: str, ahead: int = 0) -> int:
        """A number of things of at least so many bytes, that can all be there."""
        (count,) = self._unpack("<Q", what)
        if count * least > len(self.data) - self.at - ahead:
            self._damaged(f"claims {count:,} {what}, for which it is too short")
        return int(count)

    def _unpack(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form), what))

    def _take(self, size: int, what: str) -> memoryview:
        if size > len(self.data) - self.at:
            self._cut_short(what)
        self.at += size
        return self.view[self.at - size : self.at]

    def _cut_short(self, what: str) -> NoReturn:
        raise UserError(f"{self.path}: cut short or damaged: {what} would end behind its end; fetch it again")

    def _damaged(self, what: str) -> NoReturn:
        raise UserError(f"{self.path}: damaged: {what}; fetch it again")
