"""A Gemma 3 goes out as a GGUF file and comes back, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_ft.export.form_names import GgufType
from gemma_ft.export.gguf_import.import_gguf import import_gguf
from tests.export.files_to_import import exported
from tests.export.gguf_files import SIZES, save_gemma_3

QUICK = ("gemma-3-270m", "gemma-3-4b")  # without scaled positions and a padded table, and with them


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize(
    "size", [size if size in QUICK else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]
)
def test_export_import_export_is_the_same_to_the_byte(size: str, kind: GgufType, tmp_path: Path) -> None:
    """Window, both RoPE bases, linear scaling, q/k norms, and a table that is cut to the tokens."""
    base = save_gemma_3(tmp_path / "base", size)
    first = exported(base, tmp_path / "1" / "x.gguf", kind)
    found = import_gguf(first, tmp_path / "again", config=base / "config.json")
    assert found.notes() == []
    assert exported(tmp_path / "again", tmp_path / "2" / "x.gguf", kind).read_bytes() == first.read_bytes()
