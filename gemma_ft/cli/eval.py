"""`gemma-ft eval`: what was learned, in figures: base, adapter and merged model side by side."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_ft.cli.start import check_model
from gemma_ft.system.paths import given_path

Source = Annotated[str, typer.Argument(metavar="RECIPE_OR_RUN", help="Run directory, or a recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
]
AdapterDir = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="Adapter folder, instead of the run's own.", parser=given_path),
]
MergedDir = Annotated[
    Path | None,
    typer.Option("--merged", metavar="DIR", help="Merged folder, instead of merging in memory.", parser=given_path),
]
Models = Annotated[
    str | None, typer.Option("--models", metavar="NAMES", help="Of base, adapter, merged, tuned; default: all.")
]
Rows = Annotated[int | None, typer.Option("--rows", metavar="N", min=1, help="Held-out rows to score and answer.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", metavar="N", min=1, help="Rows at a time.")]
Metrics = Annotated[
    str | None, typer.Option("--metrics", metavar="NAMES", help="Of answers; default: those that fit the rows.")
]
Window = Annotated[int | None, typer.Option("--window", metavar="N", help="Tokens of a long text read at once.")]
Stride = Annotated[
    int | None, typer.Option("--stride", metavar="N", help="Tokens between two windows; default: half of one.")
]
Tasks = Annotated[
    str | None, typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness to run as well.")
]
TaskPath = Annotated[
    Path | None,
    typer.Option("--task-path", metavar="DIR", help="Folder with task files (.yaml) of your own.", parser=given_path),
]
TaskLimit = Annotated[int | None, typer.Option("--task-limit", metavar="N", min=1, help="Rows of each task.")]
TaskChat = Annotated[bool, typer.Option("--task-chat", help="Put each task's question into the chat template.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Where results go; default, for a run as it is: its eval.json.",
        parser=given_path,
    ),
]


def evaluate(
    source: Source,
    overrides: Overrides = None,
    adapter: AdapterDir = None,
    merged: MergedDir = None,
    models: Models = None,
    rows: Rows = None,
    batch_size: BatchSize = None,
    metrics: Metrics = None,
    window: Window = None,
    stride: Stride = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    task_limit: TaskLimit = None,
    task_chat: TaskChat = False,
    out: Out = None,
) -> int:
    """Score a tuned Gemma beside its base."""
    check_model(source, adapter, instead="give a run directory or a recipe")
    from rich.console import Console

    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.evaluate.compare import EvalOptions
    from gemma_ft.evaluate.models import find_models
    from gemma_ft.ui.evaluation import evaluate_and_show

    options = EvalOptions(
        models=_names("--models", models),
        rows=rows,
        batch_size=batch_size,
        metrics=_names("--metrics", metrics),
        window=window,
        stride=stride,
        tasks=_names("--tasks", tasks) or (),
        task_path=task_path,
        task_limit=task_limit,
        task_chat=task_chat,
        out=out,
    )
    compared = find_models(source, overrides or (), adapter=adapter, merged=merged)
    evaluate_and_show(compared, options, stdout=Console(), stderr=Console(stderr=True))
    return 0


def _names(option: str, text: str | None) -> list[str] | None:
    """ "a,b" as a list; None stays None. Raises: UserError for a list of nothing."""
    from gemma_ft.errors import UserError

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option}: names nothing; give names with commas between them, or leave it out")
    return names
