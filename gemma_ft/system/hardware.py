"""What kind of processor this is, as far as the code and the paths that are best for it depend on it. No torch."""

from __future__ import annotations

from pathlib import Path


def processor_words() -> str:
    """What the code and the paths that are best for this processor depend on, as Linux tells it: vendor and flags."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    told = (next((one for one in lines if one.startswith(name)), ":") for name in ("vendor_id", "flags", "Features"))
    return " ".join(one.partition(":")[2].strip() for one in told).strip()


def float32_is_faster(processor: str) -> bool:
    """Whether products of bf16 are faster as products of float32: on an x86 without tiles for them. `processor`: what
    `processor_words` says. AMD's with bf16 multiply pairs at the full rate; what is no x86 is left as it is.
    """
    words = processor.split()
    if "amx_bf16" in words or "sse2" not in words:
        return False
    return "avx512_bf16" not in words or "GenuineIntel" in words
