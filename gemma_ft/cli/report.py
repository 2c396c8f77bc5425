"""`gemma-ft report`: a run as one page, or several compared."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_ft.system.paths import given_path


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.", parser=given_path)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The page; else RUN/report.html, or comparison.html for several.",
            parser=given_path,
        ),
    ] = None,
) -> int:
    """Write the page of a run, or one that compares several."""
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.pages.comparison import write_comparison
    from gemma_ft.ui.pages.page import write_report

    if len(runs) == 1:
        written = write_report(runs[0], out or runs[0] / "report.html")
    else:
        written = write_comparison(runs, out or Path("comparison.html"))
    print(written)
    return 0
