"""How many operations a training step issues for each decoder layer: what stands for launches on a GPU, without one.

    .venv/bin/python -m benchmarks.launches              count, and write benchmarks/results/launches.json
    .venv/bin/python -m benchmarks.launches --where      only say which lines of ours issue what

A forward and backward of a tiny model run on the CPU, and every operation of torch that computes or copies counts as
one launch. Half of what a model of four layers issues beyond one of two is a layer's: embedding, head, masks and
optimizer are not in it. Ours runs as on a GPU: what a Triton kernel would do, plain torch does without being counted,
and counts as that kernel's one launch.

FlexAttention counts as one launch forwards and two backwards (its `delta`, and the kernel), its results laid out as
its inputs are, which is how torch's lowering has them. torch's scaled_dot_product_attention counts as the operations
that it calls. bitsandbytes dequantizes NF4 in three launches, and its 4-bit product counts as what it issues for more
than 1,536 rows.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_models
from benchmarks.page_performance import columns, launches
from benchmarks.shared.record import ROOT, write_result
from gemma_ft.kernels import cross_entropy, geglu, rms_norm, rotary
from gemma_ft.kernels.blockwise_attention import blockwise_attention
from gemma_ft.kernels.plain_tensors import DTYPES

TOKENS, ROWS, SHOWN = 32, 2, 10
FEWER, MORE = 2, 4  # layers
SMALL = {key: size for key, size in gpu_models.TINY.items() if key not in ("num_hidden_layers", "sliding_window")}
SIZES = {"gemma-2-2b": SMALL | {"sliding_window": 16}, "gemma-2b": SMALL | {"num_key_value_heads": 1}}
STOCK_ATTENTION = {"gemma-2-2b": "eager", "gemma-2b": "sdpa"}  # eager for the cap
OUR_ATTENTION = "blockwise"  # what the resolver chooses where there is a GPU
KINDS = ("lora", "qlora")
ARMS = {  # (native, checkpointed)
    "stock": (False, False),
    "stock_checkpointed": (False, True),
    "ours": (True, False),
    "ours_checkpointed": (True, True),
}
OURS = f"{ROOT}/gemma_ft/"
FREE = frozenset(
    f"aten.{name}"
    for name in (
        # memory without a value
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
        # a question about dtypes
        "promote_types",
        # other views of memory that is there
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh",
        "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold",
        "unsqueeze", "view",
    )
)  # fmt: skip
AS_MANY = {  # operations that torch does not show the inside of
    "aten.slice_backward": 2,  # zeros, and the copy into them
    "aten._safe_softmax": 5,  # softmax, and zeros where a row sees nothing
    "bitsandbytes.gemm_4bit": 4,  # scales, their offset, numbers, product
}


class Launches(TorchDispatchMode):
    """Counts operations while it is entered: (operation, line of ours that called it or "autograd") -> how many."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self._aside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        if not self._aside and name not in FREE:
            self.found[name, _caller()] += AS_MANY.get(name, 1)
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def instead(self, name: str, count: int = 1) -> Iterator[None]:
        """Counts `count` of `name`, and nothing of what is done meanwhile."""
        self.found[name, _caller()] += count
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def taken(self) -> Counter[tuple[str, str]]:
        """What was counted since the last time."""
        found, self.found = self.found, Counter()
        return found


def _caller() -> str:
    """The innermost line of gemma_ft on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


def _gradients(function: Callable[..., Tensor], upstream: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_() for one in given]
        return torch.autograd.grad(function(*leaves), leaves, upstream)


class _Kernels:
    """What stands for the Triton kernels, under their functions' names and with their arguments."""

    def __init__(self, count: Launches) -> None:
        self.count = count

    def norm(
        self, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, rstd: Tensor, eps: float
    ) -> None:  # fmt: skip
        with self.count.instead("triton.rms_norm"):
            out.copy_(rms_norm.rms_norm_reference(x, weight, eps, residual))
            rstd.copy_(torch.rsqrt(x.float().pow(2).mean(-1) + eps))

    def norm_backward(self, upstream: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor) -> None:
        with self.count.instead("triton.rms_norm"):
            wide, pull, scale = x.float(), upstream.float() * (1.0 + weight.float()), rstd[..., None]
            grad.copy_(pull * scale - wide * (pull * wide).mean(-1, keepdim=True) * scale**3)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: float) -> None:
        with self.count.instead("triton.rotary"):
            out.copy_(rotary.rotate_reference(x, cos, sin * sign))

    def geglu(self, gate: Tensor, up: Tensor, out: Tensor) -> None:
        with self.count.instead("triton.geglu"):
            out.copy_(geglu.geglu_reference(gate, up))

    def geglu_backward(self, upstream: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
        with self.count.instead("triton.geglu"):
            of_gate, of_up = _gradients(geglu.geglu_reference, upstream, gate, up)
            grad_gate.copy_(of_gate)
            grad_up.copy_(of_up)

    def rows(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None, losses: Tensor, correct: Tensor,
        entropies: Tensor, cap: float | None, *, with_grad: bool,
    ) -> None:  # fmt: skip
        with self.count.instead("triton.cross_entropy"):
            found = cross_entropy.fused_cross_entropy_reference(logits, targets, weights, cap, with_grad=with_grad)
            for one, value in zip((losses, correct, entropies, logits), found, strict=True):
                if value is not None:
                    one.copy_(value)

    def gradient(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        with self.count.instead("aten.mm, written in float32"):
            return (x.float().T @ y.float()).to(dtype)

    def dequantize(self, packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
        with self.count.instead("triton.nf4"):
            return dequantize_4bit(packed, state, out=out)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, low: Tensor, **options: Any) -> Tensor:
        out: Tensor = _Flex.apply(query, key, value, low, options, self.count)
        return out


@contextlib.contextmanager
def as_on_a_gpu(count: Launches) -> Iterator[None]:
    """Our operations take what they would take on a GPU; plain torch computes it, and `count` is told of one launch."""
    from gemma_ft.adapters import fused_lora
    from gemma_ft.kernels import blockwise_attention as blockwise
    from gemma_ft.kernels.triton import cross_entropy, geglu, nf4, rms_norm, rotary, triton_backend

    def serves_all(*tensors: Tensor | None) -> bool:
        given = [one for one in tensors if one is not None]
        return given[0].dtype in DTYPES and all(one.dtype == given[0].dtype for one in given)

    kernels = _Kernels(count)
    with contextlib.ExitStack() as patched:
        for module, changed in (
            (triton_backend, {"serves": serves_all}),
            (rms_norm, {"forward": kernels.norm, "backward": kernels.norm_backward}),
            (rotary, {"turn": kernels.turn}),
            (geglu, {"forward": kernels.geglu, "backward": kernels.geglu_backward}),
            (cross_entropy, {"rows": kernels.rows}),
            (blockwise, {"blockwise_attention": kernels.attend}),
            (nf4, {"takes": lambda *_: True, "dequantize": kernels.dequantize}),
            (fused_lora, {"transposed_times": kernels.gradient}),
        ):
            patched.enter_context(mock.patch.multiple(module, **changed))
        yield


class _Flex(torch.autograd.Function):
    """What counts as FlexAttention, computed by our attention for a CPU."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, low: Tensor, options: dict[str, Any], count: Launches
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.attend, ctx.count = lambda q, k, v: blockwise_attention(q, k, v, low, **options), count
        with count.instead("flex_attention"):
            return torch.empty_like(query).copy_(ctx.attend(query, key, value))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        with ctx.count.instead("flex_attention", 2):
            found = _gradients(ctx.attend, upstream, *given)
            laid = [torch.empty_like(one).copy_(grad) for one, grad in zip(given, found, strict=True)]
        return *laid, None, None, None


def model_of(name: str, kind: str, layers: int, *, native: bool, checkpointed: bool) -> Any:
    """A tiny model of that family with adapters on all of its linear layers, as `gemma-ft train` or PEFT puts them."""
    from gemma_ft.families.records import PRESETS

    config = PRESETS[name].config(**SIZES[name], num_hidden_layers=layers)
    attention = OUR_ATTENTION if native else STOCK_ATTENTION[name]
    model = gpu_models.base(
        config, native=native, device=torch.device("cpu"), attention=attention, quantize=kind == "qlora"
    )
    adapted = gpu_models.with_lora(model, fused=native)
    if checkpointed:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def step(model: Any, *, native: bool) -> tuple[Tensor, dict[str, Counter[tuple[str, str]]]]:
    """The loss of one forward and backward, and what each of the two issued. Rows are packed."""
    batch = gpu_models.batches(model.config, tokens=TOKENS, rows=ROWS, packed=True, steps=1,
                               device=torch.device("cpu"))[0]  # fmt: skip
    count, found = Launches(), {}
    with as_on_a_gpu(count) if native else contextlib.nullcontext(), count:
        loss: Tensor = model(**batch, use_cache=False).loss
        found["forward"] = count.taken()
        loss.backward()
        found["backward"] = count.taken()
    return loss.detach(), found


def of_a_layer(name: str, kind: str, arm: str) -> dict[str, Counter[tuple[str, str]]]:
    """What one layer issues forwards and backwards: the mean of two, for Gemma 2's have two kinds of attention."""
    native, checkpointed = ARMS[arm]
    few, many = (
        step(model_of(name, kind, layers, native=native, checkpointed=checkpointed), native=native)[1]
        for layers in (FEWER, MORE)
    )
    found = {}
    for part, counted in many.items():
        counted.subtract(few[part])
        found[part] = Counter({key: _each(value) for key, value in counted.items() if value})
    return found


def _each(more: int) -> int:
    each, rest = divmod(more, MORE - FEWER)
    assert rest == 0, "both kinds of layer issue the same"
    return each


def figures(found: dict[str, Counter[tuple[str, str]]]) -> dict[str, Any]:
    """Launches forwards, backwards and in all, and the operations that are issued most."""
    whole: Counter[str] = Counter()
    for counted in found.values():
        for (operation, _), times in counted.items():
            whole[operation] += times
    parts = {part: counted.total() for part, counted in found.items()}
    return parts | {"total": whole.total(), "operations": dict(whole.most_common(SHOWN))}


def where(name: str, kind: str, arm: str) -> str:
    """Which lines of ours issue what of a layer's launches."""
    rows = [["", "line", "operation", "launches"]]
    for part, counted in of_a_layer(name, kind, arm).items():
        places = sorted((line, operation, times) for (operation, line), times in counted.items())
        rows += [[part, line, operation, str(times)] for line, operation, times in places]
    return columns(rows)


def main(arguments: list[str]) -> None:
    from gemma_ft.system import environment

    environment.quiet_libraries()
    if "--where" in arguments:
        for name in SIZES:
            for kind in KINDS:
                print(f"{name}, {kind}\n{where(name, kind, 'ours')}\n")
        return
    lines = {
        f"{name}:{kind}": {arm: figures(of_a_layer(name, kind, arm)) for arm in ARMS}
        for name in SIZES
        for kind in KINDS
    }
    print(columns(launches({"per_layer": lines})))
    write_result(
        "launches", also=("peft",), command="python -m benchmarks.launches", shapes=SIZES, rank=gpu_models.RANK,
        layers=[FEWER, MORE], stock_attention=STOCK_ATTENTION, per_layer=lines,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
