"""`gemma-ft import` as a person sees it: what was written, and what the file did not say."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from gemma_ft.build.weights import dtype_name
from gemma_ft.export.gguf_import.import_gguf import Import, import_gguf
from gemma_ft.system.units import byte_size
from gemma_ft.ui.progress import ConsoleObserver, say


def import_and_show(
    path: Path, out: Path, *, dtype: str | None, config: Path | None, console: Console | None = None
) -> Import:
    """Import as `import_gguf` does and print what came of it. Raises: UserError and its children."""
    console = console or Console()
    done = import_gguf(path, out, dtype=dtype, config=config, observer=ConsoleObserver(console))
    weights = done.weights
    say(
        console,
        f"{out}: {done.family.label}, {len(weights.tensors)} tensors, {byte_size(weights.bytes, 'GB', '.3g')}, "
        f"{dtype_name(weights.dtype)}",
    )
    for note in done.notes():
        say(console, f"note: {note}")
    return done
