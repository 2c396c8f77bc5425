"""`gemma-ft merge`: an adapter into its base, as a plain model folder with a certificate."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from gemma_ft.cli.start import check_model
from gemma_ft.errors import UserError
from gemma_ft.system.paths import given_path

Graft = Annotated[
    bool, typer.Option("--graft", help="Back into the multimodal folder that the base is, its vision tower as it was.")
]


def merge(
    model: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or adapter folder.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The new folder.", show_default=False, parser=given_path)
    ],
    dtype: Annotated[
        Literal["bf16", "f32"] | None,
        typer.Option("--dtype", help="How weights are written; without it: as in the base.", show_default=False),
    ] = None,
    policy: Annotated[
        Literal["original", "dequantized"],
        typer.Option("--base", help="What a QLoRA adapter is added to: the base as it was, or as training saw it."),
    ] = "original",
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR[:WEIGHT]",
            help="Adapter or run to merge instead of RUN's own; several are added up with their weights.",
            show_default=False,
        ),
    ] = None,
    graft: Graft = False,
    prompts: Annotated[
        int, typer.Option("--prompts", metavar="N", min=0, help="Held-out rows that the certificate compares; 0: none.")
    ] = 32,
) -> int:
    """Merge an adapter into its base and certify that the model is the same."""
    check_model(model)
    named = [_with_weight(text) for text in adapters or ()]
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.merge import merge_and_show

    merge_and_show(model, out, adapters=named, dtype=dtype, policy=policy, graft=graft, prompts=prompts)
    return 0


def _with_weight(text: str) -> tuple[Path, float]:
    """DIR or DIR:WEIGHT, in a linear combination. Raises: UserError."""
    folder, colon, number = text.rpartition(":")
    if not colon or given_path(text).exists():
        return given_path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"--adapter {text}: expected DIR or DIR:WEIGHT with a number other than 0, got {number!r}")
    return given_path(folder), weight
