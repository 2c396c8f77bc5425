"""The weights in a GGUF file as safetensors: each widened to float32, norms without the 1 that llama.cpp has in them,
and written some rows at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.build.weights import HEAD, WeightFiles, sharded
from gemma_ft.errors import UserError
from gemma_ft.export.gguf_file import ELEMENTS_AT_ONCE
from gemma_ft.export.gguf_reader import GgufFile, StoredTensor, gguf_library
from gemma_ft.families.family import Family
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.system.limits import MAX_SHARD_BYTES

NAMED = {torch.float32: "F32", torch.bfloat16: "BF16"}  # by safetensors


@dataclass(frozen=True)
class Widened:
    """A tensor of the model and where the file has it. minus_one: a norm, which llama.cpp multiplies by as it is, and
    Gemma as 1 + weight.
    """

    name: str
    stored: StoredTensor
    minus_one: bool

    def blocks(self, file: GgufFile) -> Iterator[Tensor]:
        """Its values in float32, some rows at a time, as [rows, columns]. Raises: UserError where one is not finite."""
        for rows in file.rows(self.stored, ELEMENTS_AT_ONCE):
            values = torch.from_numpy(np.array(rows, dtype=np.float32))
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"{file.path}: {self.stored.name} holds NaN or infinity; fetch the file again")
            yield values - 1.0 if self.minus_one else values


@dataclass
class Rounding:
    """What is lost by a cast, relative to each number that is not 0."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """Count the numbers of one block."""
        kept = exact != 0
        off = ((rounded.float() - exact).abs() / exact.abs())[kept]
        if off.numel():
            self.largest = max(self.largest, float(off.max()))
            self.total += float(off.double().sum())
            self.count += off.numel()

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


@dataclass
class FileWeights:
    """All weights of a file, as the model has them, in one dtype. `rounding`: of what was written."""

    file: GgufFile
    tensors: Sequence[Widened]
    dtype: torch.dtype
    rounding: Rounding = field(default_factory=Rounding)

    @property
    def bytes(self) -> int:
        """What they will weigh."""
        return sum(math.prod(one.stored.shape) for one in self.tensors) * self.dtype.itemsize

    def write(
        self, folder: Path, on_progress: Callable[[int, int], None], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Write model.safetensors, or shards with an index; memory holds some rows of one tensor."""
        by_name = {one.name: one for one in self.tensors}
        done = 0

        def save(path: Path, names: Sequence[str]) -> None:
            nonlocal done
            with path.open("wb") as out:
                out.write(_header([by_name[name] for name in names], self.dtype))
                for name in names:
                    for block in by_name[name].blocks(self.file):
                        made = block.to(self.dtype)
                        if self.dtype != torch.float32:
                            self.rounding.add(block, made)
                        out.write(made.contiguous().view(torch.uint8).numpy().data)
                    done += 1
                    on_progress(done, len(self.tensors))

        infos = {one.name: (self.dtype, one.stored.shape) for one in self.tensors}
        sharded(folder, infos, save, max_shard_bytes=max_shard_bytes)
        written = WeightFiles.open(folder)
        found = {name: (written.info(name).dtype, written.info(name).shape) for name in written.names}
        assert found == infos, f"{folder}: not as planned"


def _header(tensors: Sequence[Widened], dtype: torch.dtype) -> bytes:
    """The beginning of a safetensors file. Source: the format's own description, huggingface/safetensors README."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for one in tensors:
        end = start + math.prod(one.stored.shape) * dtype.itemsize
        header[one.name] = {"dtype": NAMED[dtype], "shape": list(one.stored.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def weights_of_file(
    file: GgufFile, family: Family, config: PreTrainedConfig, where: str, dtype: torch.dtype | None
) -> FileWeights:
    """The weights of a file for the model of `config`, which is from `where`.

    dtype None: float32, and bfloat16 for a file that holds nothing else: nothing is lost.
    Raises: UserError for a tensor that is missing, too many, of another shape, or of a type that gguf does not widen.
    """
    tensors = _planned(file, family, config, where)
    for one in tensors:
        _check_type(file, one.stored)
    return FileWeights(file, tensors, dtype or _kept(file, tensors))


def _planned(file: GgufFile, family: Family, config: PreTrainedConfig, where: str) -> list[Widened]:
    gguf, known = gguf_library(), family.gguf
    assert known is not None
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[known.architecture.upper()], config.num_hidden_layers)
    with torch.device("meta"):
        model = GemmaForCausalLM(config)
    wanted: Mapping[str, tuple[int, ...]] = {
        name: tuple(weight.shape) for name, weight in model.state_dict().items() if name != HEAD
    }
    planned = []
    for name, shape in wanted.items():
        called = names.get_name(name, try_suffixes=(".weight",))
        stored = file.tensors.get(called)
        if stored is None:
            raise UserError(f"{file.path}: has no tensor {called} ({name}); fetch it again, or convert the model again")
        if stored.shape != shape:
            raise UserError(
                f"{file.path}: {stored.name} is {list(stored.shape)}, {where} asks for {list(shape)}; "
                "it is another model"
            )
        planned.append(Widened(name, stored, name.endswith(known.plus_one)))
    extra = sorted(file.tensors.keys() - {one.stored.name for one in planned})
    if extra:
        raise UserError(
            f"{file.path}: has {len(extra)} tensors that no {family.label} of its size has, {extra[0]} among them; "
            "it is another model"
        )
    return sorted(planned, key=lambda one: one.stored.start)  # an export keeps the order in which it finds them


def _check_type(file: GgufFile, stored: StoredTensor) -> None:
    """Raises: UserError for a type whose numbers the gguf package cannot give."""
    gguf = gguf_library()
    kind = gguf.GGMLQuantizationType[stored.type]
    size = gguf.GGML_QUANT_SIZES[kind][1]  # bytes of a block
    try:
        gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise UserError(
            f"{file.path}: {stored.name} is stored as {stored.type}, which the package gguf cannot widen; convert the "
            "model to Q8_0 or F16"
        ) from error


def _kept(file: GgufFile, tensors: Sequence[Widened]) -> torch.dtype:
    """bfloat16 where it holds every number of a file of BF16 matrices, else float32."""
    matrices = {one.stored.type for one in tensors if len(one.stored.shape) > 1}
    norms = (one for one in tensors if len(one.stored.shape) == 1)
    exact = matrices == {"BF16"} and all(
        bool((block.bfloat16().float() == block).all()) for one in norms for block in one.blocks(file)
    )
    return torch.bfloat16 if exact else torch.float32
