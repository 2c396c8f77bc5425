"""What the real Gemma 3 270M reads: texts that do not change, one of them where it lies beside the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
CHARACTERS = 6000  # more than the tokens that are read
SENTENCES = (
    "The quick brown fox jumps over the lazy dog. Water boils at one hundred degrees Celsius at sea level. "
    "Paris is the capital of France, and London is the capital of England."
)


def long_texts() -> dict[str, str]:
    """The beginnings of long texts by name: this project's licence, and tinyshakespeare where it was given."""
    places = {"licence": ROOT / "LICENSE", "tinyshakespeare": SHAKESPEARE}
    return {name: path.read_text(encoding="utf-8")[:CHARACTERS] for name, path in places.items() if path.is_file()}
