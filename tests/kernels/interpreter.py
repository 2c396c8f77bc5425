"""Triton's interpreter, which stands in for a GPU, made to compute in bf16 as one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def mend_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter holds bf16 as bits: it cuts numbers off to get them, and in a dot it multiplies the bits."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot, plain_trunc = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return plain_trunc(self, source, target)
        bits = torch.tensor(source.data).bfloat16().view(torch.int16).numpy().view("uint16")
        return TensorHandle(bits, tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        wide = [
            TensorHandle((one.data.astype("uint32") << 16).view("float32"), tl.float32)
            if one.dtype.scalar == tl.bfloat16
            else one
            for one in (a, b)
        ]
        return plain_dot(self, *wide, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
