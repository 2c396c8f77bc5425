"""Implementations of one backend at a time, whatever would run here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.kernels import cpp_backend, flex_attention, matmul
from gemma_ft.kernels.plain_tensors import DTYPES, are_plain
from gemma_ft.kernels.triton import triton_backend as triton
from tests.kernels.interpreter import mend_bf16


def _nothing(*_: Tensor | None) -> bool:
    return False


def force(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """From here on implementations of that backend run, or plain torch where it has none; returns the device that
    tensors are to be on. Triton's run on a GPU, or by its interpreter as if the CPU were one. Skips what is not here.
    """
    if name == "cpp" and not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    if name == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if name == "flex" and not torch.cuda.is_available():
        monkeypatch.setattr(flex_attention, "serves", lambda query, *_: query.dtype in DTYPES)
        return "cpu"
    if name in ("triton", "flex") and torch.cuda.is_available():
        return "cuda"
    if name == "triton":
        mend_bf16(monkeypatch)
        monkeypatch.setattr(triton, "serves", _as_on_a_gpu)
        monkeypatch.setattr(triton, "reason_against", lambda *_: None)
        monkeypatch.setattr(cpp_backend, "call", _refuse)
    if name not in ("cpp", "triton"):
        monkeypatch.setattr(cpp_backend, "serves", _nothing)
    monkeypatch.setattr(matmul, "widens", lambda: name == "float32")
    return "cpu"


def _as_on_a_gpu(*tensors: Tensor | None) -> bool:
    given = [one for one in tensors if one is not None]
    return given[0].dtype in DTYPES and are_plain(*given)


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("C++ ran")
