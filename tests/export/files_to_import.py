"""GGUF files to import: exported by us, and with other keys or tensors than that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_ft.export.export import ExportOptions, export_model
from gemma_ft.export.form_names import GgufType

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")


def exported(folder: Path | str, out: Path, kind: GgufType | None = None) -> Path:
    """A folder as a GGUF file, in a folder of its own."""
    out.parent.mkdir(exist_ok=True)
    export_model(str(folder), ExportOptions(to="gguf", out=out, gguf_type=kind))
    return out


def rewritten(source: Path, out: Path, *, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A GGUF file with other keys or tensors: `change` is given fields (key -> (value, type, type of a list)) and
    tensors (name -> (bytes as gguf shapes them, type)).
    """
    reader = gguf.GGUFReader(str(source))
    fields = {
        name: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    stored = {one.name: (np.array(one.data), one.tensor_type) for one in reader.tensors}
    change(fields, stored)
    writer = gguf.GGUFWriter(str(out), fields.pop("general.architecture", ("gemma2", None, None))[0])
    for name, (value, kind, item) in fields.items():
        writer.add_key_value(name, value, kind, item)
    for name, (data, kind) in stored.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
