"""A transformers folder of a Gemma as one GGUF file for llama.cpp: metadata, vocabulary and tensors, written a few rows
at a time.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.build.contract import Contract
from gemma_ft.build.weights import EMBEDDING
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.own_template import own_encoder
from gemma_ft.errors import UserError
from gemma_ft.export.form_names import GgufType
from gemma_ft.export.gguf_chat import add_chat
from gemma_ft.export.gguf_check import check_for_llama_cpp, known_to_llama_cpp
from gemma_ft.export.gguf_reader import gguf_library, read_gguf
from gemma_ft.export.gguf_tokenizer import GgufVocabulary, add_vocabulary
from gemma_ft.export.merge.merged import MergedWeights
from gemma_ft.families.records import FAMILIES
from gemma_ft.model.config import GemmaNumerics

CONTRACT_KEY = "gemma_ft.contract"
LARGEST_F16 = 65504.0
ELEMENTS_AT_ONCE = 1 << 22  # what is converted in one go: 16 MiB in float32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: its name there and in the folder, its shape, and how it is stored."""

    name: str
    source: str
    shape: tuple[int, ...]
    stored: GgufType
    bytes: int
    plus_one: bool  # a norm: Gemma stores weight - 1, llama.cpp multiplies by what it finds

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class GgufPlan:
    """What a GGUF file of a model will hold, all of it known before a tensor is made. `config`: of the merged model."""

    kind: GgufType
    config: PreTrainedConfig
    tensors: list[GgufTensor]

    @property
    def bytes(self) -> int:
        """What its tensors weigh."""
        return sum(tensor.bytes for tensor in self.tensors)


def plan_gguf(weights: MergedWeights, kind: GgufType, *, tokens: int | None = None) -> GgufPlan:
    """The plan of a file, whose embedding has `plan.config.vocab_size` rows. tokens: how many the tokenizer has (one
    more than its last id); where llama.cpp's table ends with them, the embedding's rows beyond are left out.

    Raises: UserError where llama.cpp would compute another model, or q8_0 cannot store one.
    """
    config = copy.deepcopy(weights.config)
    config.vocab_size = weights.vocab_size
    if tokens is not None and known_to_llama_cpp(config).cut:
        config.vocab_size = min(tokens, weights.vocab_size)
    check_for_llama_cpp(config)
    return GgufPlan(kind, config, _plan_tensors(weights, config, kind))


def _plan_tensors(weights: MergedWeights, config: PreTrainedConfig, kind: GgufType) -> list[GgufTensor]:
    """Every tensor that the file will hold, in the order in which the folder's files hold them.

    Matrices are stored as `kind`, norms always in float32. There is no head: llama.cpp's is the embedding.
    Raises: UserError for a matrix whose rows q8_0 cannot cut into blocks.
    """
    gguf = gguf_library()
    known = known_to_llama_cpp(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[known.architecture.upper()], config.num_hidden_layers)
    planned = []
    for source, (_, shape) in weights.infos.items():
        if source == EMBEDDING:
            shape = (config.vocab_size, *shape[1:])
        stored: GgufType = kind if len(shape) > 1 else "f32"
        block, size = gguf.GGML_QUANT_SIZES[_type(gguf, stored)]
        if shape[-1] % block:
            raise UserError(
                f"{source}: q8_0 stores blocks of {block}, and its rows have {shape[-1]} elements; use --gguf-type bf16"
            )
        planned.append(
            GgufTensor(
                name=names.get_name(source, try_suffixes=(".weight",)),
                source=source,
                shape=tuple(shape),
                stored=stored,
                bytes=math.prod(shape) // block * size,
                plus_one=source.endswith(known.plus_one),
            )
        )
    return planned


def write_gguf(
    plan: GgufPlan,
    weights: MergedWeights,
    tokenizer: Any,
    vocabulary: GgufVocabulary,
    out: Path,
    *,
    name: str,
    license: tuple[str, str] | None = None,
    contract: Contract | None = None,
    encoder: ChatEncoder | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model's weights with the `vocabulary` of `tokenizer` as the GGUF file `out`, as planned, and reopen it.

    encoder: how its chats are asked (default: as the tokenizer's own chat template says). license: name and link.
    on_progress: is told tensors done, tensors in all. Memory holds one tensor of `weights`.
    Raises: UserError when a weight does not fit the plan's type, or is not finite.
    """
    gguf, config, tensors = gguf_library(), plan.config, plan.tensors
    assert len(vocabulary.tokens) == config.vocab_size, "a vocabulary of another plan"
    writer = gguf.GGUFWriter(str(out), known_to_llama_cpp(config).architecture)
    try:
        _add_general(gguf, writer, plan.kind, name, license, contract)
        _add_hyperparameters(gguf, writer, config)
        add_vocabulary(writer, vocabulary)
        add_chat(writer, encoder if encoder is not None else own_encoder(tokenizer, weights.place.folder))
        for tensor in tensors:
            stored = _type(gguf, tensor.stored)
            writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.bytes, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(_Rows(tensor, weights.tensor(tensor.source)[: tensor.shape[0]]))
            if on_progress is not None:
                on_progress(done, len(tensors))
    finally:
        writer.close()
    verify_gguf(out, tensors)


def verify_gguf(path: Path, tensors: list[GgufTensor]) -> None:
    """Open a file that was just written and find every tensor in it, whole and of its type. A difference is a fault of
    ours.
    """
    try:
        found = {one.name: (one.shape, one.type, one.bytes) for one in read_gguf(path).tensors.values()}
    except UserError as error:
        raise AssertionError(str(error)) from error  # its cure is for files that came from elsewhere
    planned = {tensor.name: (tensor.shape, tensor.stored.upper(), tensor.bytes) for tensor in tensors}
    assert found == planned, f"{path}: not as planned"


def _add_general(
    gguf: ModuleType,
    writer: Any,
    kind: GgufType,
    name: str,
    license: tuple[str, str] | None,
    contract: Contract | None,
) -> None:
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if license is not None:
        writer.add_license(license[0])
        writer.add_license_link(license[1])
    if contract is not None:
        writer.add_string(CONTRACT_KEY, json.dumps(contract.said()))


def _add_hyperparameters(gguf: ModuleType, writer: Any, config: PreTrainedConfig) -> None:
    numerics, family = GemmaNumerics.from_config(config), FAMILIES[config.model_type]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    rope = family.rope("full_attention", config.to_dict())  # which no layer of a shallow model may have
    writer.add_rope_freq_base(rope.theta)
    if rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if numerics.attn_softcap is not None:
        writer.add_attn_logit_softcapping(numerics.attn_softcap)
    if numerics.final_softcap is not None:
        writer.add_final_logit_softcapping(numerics.final_softcap)
    if family.window_period is not None:
        # llama.cpp takes 4096 where none is given: no window at all is one as long as the context.
        writer.add_sliding_window(numerics.window_tokens[0] or config.max_position_embeddings)


def hyperparameters(config: PreTrainedConfig) -> dict[str, Any]:
    """What a file says of the numbers of a config, by key."""
    gguf, known = gguf_library(), known_to_llama_cpp(config)
    writer = gguf.GGUFWriter(None, known.architecture)
    _add_hyperparameters(gguf, writer, config)
    return {key: stored.value for key, stored in writer.kv_data[0].items() if key.startswith(f"{known.architecture}.")}


class _Rows:
    """A tensor as GGUFWriter asks for one (`nbytes`, `tofile`), converted a few rows at a time on its way to the
    file.
    """

    def __init__(self, tensor: GgufTensor, values: Tensor) -> None:
        assert tuple(values.shape) == tensor.shape, f"{tensor.source}: not as planned"
        self.tensor = tensor
        self.values = values.reshape(tensor.rows, -1)
        self.nbytes = tensor.bytes

    def tofile(self, file: Any) -> None:
        """Append the tensor to an open file."""
        for block in self._blocks():
            file.write(np.ascontiguousarray(block).data)  # ndarray.tofile would not say that the disk is full

    def _blocks(self) -> Iterator[Any]:
        gguf, tensor = gguf_library(), self.tensor
        for values in self.values.split(max(1, ELEMENTS_AT_ONCE // self.values.shape[1])):
            wide = values.float() + 1.0 if tensor.plus_one else values.float()
            if not bool(torch.isfinite(wide).all()):
                raise UserError(f"{tensor.source}: holds NaN or infinity; the training diverged, use a checkpoint")
            if tensor.stored == "f16" and float(wide.abs().max()) > LARGEST_F16:
                raise UserError(
                    f"{tensor.source}: holds {float(wide.abs().max()):g}, and float16 ends at {LARGEST_F16:g}; "
                    "use --gguf-type bf16 or q8_0"
                )
            yield gguf.quants.quantize(wide.numpy(), _type(gguf, tensor.stored))


def _type(gguf: ModuleType, kind: GgufType) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]
