"""`gemma-ft checkpoints`: what a run can be resumed from."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_ft.system.paths import given_path

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", parser=given_path)]
Verify = Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash; exit code 3 on damage.")]
Prune = Annotated[
    int | None, typer.Option("--prune", metavar="N", min=1, help="Remove all but the newest N, and damaged ones.")
]


def checkpoints(run: RunFolder, verify: Verify = False, prune: Prune = None) -> int:
    """List the checkpoints of a run, look whether they are whole, remove old ones."""
    from rich.console import Console

    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.checkpoints import show_checkpoints

    return show_checkpoints(run, verify=verify, keep=prune, console=Console())
