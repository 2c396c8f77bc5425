"""What the Triton kernels become on a GPU, without one: registers, spills and shared memory, by NVIDIA's assembler.

    python -m benchmarks.compiled

Triton brings the assembler along, and compiles for a GPU that is not there. Shapes are those of Gemma's layers.
Writes compiled.json. A kernel that spills reads and writes memory for what it has no registers for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.record import write_result

CAPABILITIES = (80, 86, 90, 100)
WIDTHS = {"gemma-2b": 2048, "gemma-2-2b, gemma-2-9b": 3584, "gemma-2-27b": 4608, "gemma-3-270m": 640,
          "gemma-3-27b": 5376}  # fmt: skip
HEADS = {"heads of 256": 256, "heads of 128": 128}  # Gemma 3's norms of queries and keys, which add no residual
NUMBERS = {"bf16": "*bf16", "float32": "*fp32"}
# head dim, query heads to a key head, whether there is a cap
DECODED = (("gemma-2b", 256, 8, True), ("gemma-2-2b", 256, 2, True), ("gemma-2-27b", 128, 2, True),
           ("gemma-3-270m", 256, 4, False), ("gemma-3-27b", 128, 2, False))  # fmt: skip
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is launched: the types of its arguments, what is known when it is compiled, its options."""

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    fuses: bool = True
    even: tuple[str, ...] = ()


def kernels(numbers: str) -> Iterator[Kernel]:
    """All of them, over numbers of that type."""
    import triton

    from gemma_ft.kernels.triton import cross_entropy, geglu, rms_norm, rotary

    flat = {"count": "i32"}
    forward = {"gate": numbers, "up": numbers, "out": numbers, **flat}
    yield Kernel("geglu forward", geglu._forward, forward, {"BLOCK": geglu.BLOCK})
    backward = dict.fromkeys(("upstream", "gate", "up", "grad_gate", "grad_up"), numbers) | flat
    yield Kernel("geglu backward", geglu._backward, backward, {"BLOCK": geglu.BLOCK})
    for name, width in (WIDTHS | HEADS).items():
        block = triton.next_power_of_2(width)
        rows = {"x": numbers, "weight": numbers, "rstd": "*fp32", "size": "i32"}
        given = {**rows, "residual": numbers, "out": numbers, "eps": "fp32"}
        known, warps, adds = {"BLOCK": block}, rms_norm.warps(block), name not in HEADS
        called = f"norm{' + residual' if adds else ''}, {name}"
        yield Kernel(called, rms_norm._forward, given, {"ADDS": adds, **known}, warps)
        given = {**rows, "upstream": numbers, "grad": numbers}
        yield Kernel(f"norm backward, {name}", rms_norm._backward, given, known, warps)
    strides = {f"{what}_{axis}": "i32" for what in ("x", "out") for axis in ("b", "head", "t")} | {"angles_b": "i32"}
    angles = {"x": numbers, "out": numbers, "cos": "*fp32", "sin": "*fp32", "sign": "fp32"}
    for heads, half in ((4, 128), (8, 128), (16, 128), (32, 64)):
        given = {**angles, **strides, "heads": "i32", "tokens": "i32", "half": "i32"}
        yield Kernel(f"rotary, {heads} heads of {2 * half}", rotary._turn, given, {"HEADS": heads, "HALF": half})
    given = {"logits": numbers, "targets": "*i64", "weights": "*fp32", "losses": "*fp32", "correct": "*i1",
             "entropies": "*fp32"}  # fmt: skip
    known = {"CAPS": True, "WEIGHS": True, "GRADS": True, "BLOCK": cross_entropy.BLOCK}
    yield Kernel("head", cross_entropy._rows, given | {"size": "i32", "cap": "fp32"}, known, cross_entropy.WARPS)
    yield from _of_nf4(numbers)
    yield from _of_decoding(numbers)


def _of_nf4(numbers: str) -> Iterator[Kernel]:
    from gemma_ft.kernels.triton import gemv_nf4, nf4

    read = {"packed": "*u8", "absmax": "*u8"} | dict.fromkeys(("code", "code2", "absmax2", "offset"), "*fp32")
    form = {"NESTED": True, "BLOCK": 64, "BLOCK2": 256}
    given = {**read, "out": numbers, "count": "i32"}
    yield Kernel("nf4 to numbers", nf4._dequantize, given, {**form, "BYTES": nf4.BYTES}, fuses=False)
    counts = dict.fromkeys(("rows", "outputs", "inputs", "tiles"), "i32")
    tile = gemv_nf4.TILES[DTYPES[numbers]]
    known = {**form, "OUTPUTS": gemv_nf4.OUTPUTS, "TILE": tile}
    given = {**read, **counts, "x": numbers, "out": "*fp32"}
    yield Kernel("few rows of nf4", gemv_nf4._products, given, known, gemv_nf4.WARPS, False,
                 ("outputs", "inputs"))  # fmt: skip
    known = {"SPLITS": gemv_nf4.MOST_SPLITS, "ADDED": gemv_nf4.ADDED}
    yield Kernel("the same, its splits", gemv_nf4._sum, {"parts": "*fp32", "out": numbers, "count": "i32"}, known)


def _of_decoding(numbers: str) -> Iterator[Kernel]:
    from gemma_ft.kernels.triton import decode_attention, gemv_lora

    counts = {"inputs": "i32", "outputs": "i32", "rank": "i32", "scaling": "fp32"}
    given = {**counts, "x": numbers, "low": numbers, "a": "*fp32", "b": "*fp32", "out": numbers}
    known, even = {"STEP": gemv_lora.STEP}, ("inputs", "outputs")
    yield Kernel("LoRA of few rows, A", gemv_lora._low, given, known, even=even)
    known = {"BLOCK": gemv_lora.BLOCK, "RANK": 16}
    yield Kernel("LoRA of few rows, B", gemv_lora._add, given, known, even=even)
    step, warps, stages = decode_attention.STEPS[DTYPES[numbers]]
    parts = {**dict.fromkeys(("tops", "totals", "sums"), "*fp32"), "held": "*i64", "spans": "i32"}
    strides = ("q_b", "q_head", "k_b", "k_head", "k_place", "v_b", "v_head", "v_place")
    given = dict.fromkeys(("query", "keys", "values"), numbers) | dict.fromkeys(strides, "i32") | parts
    for name, width, heads, caps in DECODED:
        known = {"CAPS": caps, "HEADS": heads, "GROUP": decode_attention.GROUP, "H": width,
                 "SPAN": decode_attention.SPAN, "STEP": step, "STAGES": stages}  # fmt: skip
        yield Kernel(f"one query, {name}", decode_attention._spans, given | {"scale": "fp32", "cap": "fp32"}, known,
                     warps, even=strides)  # fmt: skip
    known = {
        "H": 256,
        "SPAN": decode_attention.SPAN,
        "TOGETHER": decode_attention.TOGETHER,
        "WIDTH": decode_attention.WIDTH,
    }
    yield Kernel("the same, its spans", decode_attention._joined, {**parts, "out": numbers, "heads": "i32"}, known)


def compiled(kernel: Kernel, capability: int) -> dict[str, int]:
    """`registers` of a thread, bytes that it `spills`, bytes of `shared` memory of a block."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: kernel.types.get(name, "constexpr") for name in kernel.function.arg_names}
    options = {"num_warps": kernel.warps, "enable_fp_fusion": kernel.fuses}
    # as at a launch: memory begins, and rows are long, in multiples of sixteen
    even = [(at,) for at, name in enumerate(signature) if signature[name][0] == "*" or name in kernel.even]
    attributes = {at: [["tt.divisibility", 16]] for at in even}
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.asm["cubin"])
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert usage is not None, said.stdout
    return {"registers": int(usage[1]), "spills": int(usage[2]), "shared": found.metadata.shared}


def measured() -> dict[str, dict[str, dict[str, int]]]:
    """kernel, numbers -> compute capability -> what it takes."""
    return {
        f"{kernel.name}, {numbers}": {f"sm_{one}": compiled(kernel, one) for one in CAPABILITIES}
        for numbers, pointer in NUMBERS.items()
        for kernel in kernels(pointer)
    }


def main() -> int:
    found = measured()
    for name, by_capability in found.items():
        print(f"{name}: " + "; ".join(f"{one} {taken}" for one, taken in by_capability.items()))
    write_result("compiled", command="python -m benchmarks.compiled", kernels=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
