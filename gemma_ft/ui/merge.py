"""`gemma-ft merge` as a person sees it: a bar while it works, then what was written and its certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gemma_ft.build.place import place_of
from gemma_ft.export.merge.certificate import BeyondLimit, certify
from gemma_ft.export.merge.merge import MergeFacts, merge_to_folder
from gemma_ft.export.merge.merged import Policy
from gemma_ft.system.files import as_json, replace_text

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
NO_CERTIFICATE = "no certificate: --prompts 0"


def merge_and_show(
    model: str,
    out: Path,
    *,
    adapters: Sequence[tuple[Path, float]],
    dtype: str | None,
    policy: Policy,
    prompts: int,
    console: Console | None = None,
) -> MergeFacts:
    """Merge as `merge_to_folder` does and print what came of it; a run keeps a copy of merge.json beside its own files.

    Raises: UserError and its children; BeyondLimit after its figures were printed.
    """
    console = console or Console()
    place = place_of(model)
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        with shown:
            facts = merge_to_folder(
                place,
                out,
                adapters=adapters,
                dtype=DTYPES[dtype] if dtype is not None else None,
                policy=policy,
                certify=partial(certify, prompts=prompts, on_progress=_bar(shown, "compare")) if prompts else None,
                on_progress=_bar(shown, "merge"),
            )
    except BeyondLimit as error:
        show_certificate(console, error.certificate, policy)
        raise
    if not adapters and place.run is not None:
        with contextlib.suppress(OSError):  # a run that cannot be written to any more: the folder has it
            replace_text(place.run.certificate, as_json(vars(facts)))
    kinds = ", ".join(f"{one['kind']} {one['folder']} x {one['weight']:g}" for one in facts.adapters)
    _say(console, f"{out}: {facts.tensors} tensors, {facts.bytes / 1e9:.3g} GB, {facts.dtype}")
    _say(console, f"  base      {facts.base['name']} ({policy})")
    _say(console, f"  merged    {kinds}; {facts.tensors - facts.changed} tensors are the base's own")
    if facts.certificate is None:
        _say(console, f"  {NO_CERTIFICATE}")
    else:
        show_certificate(console, facts.certificate, policy)
    return facts


def show_certificate(console: Console, certificate: dict[str, Any], policy: str) -> None:
    """The figures of a certificate as a table, the merge itself first, and whether they are within their limit."""
    live, limit = certificate["live"], certificate["limit"]
    title = f"Merged against live ({live['quantize'] or 'not quantized'}, {live['compute']})"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("mean KL", "max KL", "max |dlogit|", "relative", "top-1 same"):
        table.add_column(name, justify="right", no_wrap=True)
    labels = {"base": f"{live['quantize']} base"}  # against the base itself: what quantizing alone costs
    for name, one in {policy: certificate["merged"], **certificate["compared"]}.items():
        values = (one["mean_kl"], one["max_kl"], one["max_abs_dlogit"], one["relative_dlogit"])
        figures = [*(f"{value:.2g}" for value in values), f"{one['top1_agreement']:.2%}"]
        table.add_row(labels.get(name, name), *figures, style="bold" if name == policy else None)
    console.print(table)
    verdict = "passed" if certificate["passed"] else "FAILED"
    where = f"{certificate['prompts']} prompts, {certificate['positions']:,} positions of {certificate['rows']}"
    _say(console, f"  {verdict}: {limit['measure']} at most {limit['at_most']:.3g} ({limit['why']}); {where}")


def _bar(shown: Progress, what: str) -> Any:
    task: Any = None

    def update(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            task = shown.add_task(what, total=total)
        shown.update(task, completed=done, total=total)

    return update


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
