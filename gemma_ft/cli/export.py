"""`gemma-ft export`: a tuned model in the form that others load, and to the hub."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma_ft.cli.merge import Graft
from gemma_ft.cli.start import check_model
from gemma_ft.export.form_names import FormName, GgufType
from gemma_ft.system.paths import given_path


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, adapter folder or model folder.")],
    to: Annotated[
        FormName,
        typer.Option("--to", help="A transformers folder, a PEFT folder, or a file for llama.cpp.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="PATH",
            help="A new folder; for gguf also a file.gguf.",
            show_default=False,
            parser=given_path,
        ),
    ],
    gguf_type: Annotated[
        GgufType | None,
        typer.Option("--gguf-type", help="Weights in the GGUF file; without it: as they are.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "f32"] | None,
        typer.Option("--dtype", help="How --to hf writes weights; without it: as in the base.", show_default=False),
    ] = None,
    graft: Graft = False,
    base_id: Annotated[
        str | None,
        typer.Option("--base-id", metavar="OWNER/NAME", help="The adapter's base on the hub.", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Upload to the hub, privately.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Upload for everyone to see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> int:
    """Write a tuned model for transformers, PEFT, llama.cpp or the hub."""
    check_model(run)
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.export.export import ExportOptions
    from gemma_ft.ui.export import export_and_show

    options = ExportOptions(
        to=to, out=out, gguf_type=gguf_type, dtype=dtype, base_id=base_id, push=push, public=public, graft=graft
    )
    export_and_show(run, options, dry_run=dry_run)
    return 0
