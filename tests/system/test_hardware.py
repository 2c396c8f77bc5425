"""Which processors multiply float32 faster than bf16."""

import pytest

from gemma_ft.system.hardware import float32_is_faster

KNOWN = {
    "GenuineIntel sse2 avx2 fma": True,  # a laptop
    "GenuineIntel sse2 avx2 avx512f": True,
    "GenuineIntel sse2 avx2 avx512f avx512_bf16": True,  # tiles not shown to a virtual machine
    "GenuineIntel sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile": False,
    "AuthenticAMD sse2 avx2 fma": True,
    "AuthenticAMD sse2 avx2 avx512f avx512_bf16": False,
    "fp asimd bf16 i8mm": False,  # an ARM
    "": False,  # no Linux
}


@pytest.mark.parametrize("words", KNOWN)
def test_the_rule(words: str) -> None:
    assert float32_is_faster(words) == KNOWN[words]
