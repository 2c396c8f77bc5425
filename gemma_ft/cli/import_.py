"""`gemma-ft import`: the model in a GGUF file as a transformers folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma_ft.system.paths import given_path


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A Gemma as a GGUF file.", parser=given_path)],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The new folder.", show_default=False, parser=given_path)
    ],
    dtype: Annotated[
        Literal["float32", "bf16"] | None,
        typer.Option("--dtype", help="How weights are written; without it nothing is rounded.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="The model's config.json, for a size that was never published.",
            show_default=False,
            parser=given_path,
        ),
    ] = None,
) -> int:
    """Make a transformers folder of a GGUF file."""
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.import_gguf import import_and_show

    import_and_show(file, out, dtype=dtype, config=config)
    return 0
