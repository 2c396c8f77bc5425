"""`gemma-ft merge` as a person sees it: a bar while it works, then what was written and its certificate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gemma_ft.export.merge.certificate import BeyondLimit
from gemma_ft.export.merge.certified import merge_model
from gemma_ft.export.merge.merge import MergeFacts
from gemma_ft.export.merge.merged import Policy
from gemma_ft.system.units import byte_size
from gemma_ft.ui.progress import ConsoleObserver, say

NO_CERTIFICATE = "no certificate: --prompts 0"


# Of the certificate's table -> fields of what was measured.
COLUMNS = {"mean KL": "mean_kl", "max KL": "max_kl", "max |dlogit|": "max_abs_dlogit", "relative": "relative_dlogit",
           "top-1 same": "top1_agreement"}  # fmt: skip
REWARD_COLUMNS = {"mean |dreward|": "mean_abs_dreward", "max |dreward|": "max_abs_dreward",
                  "relative": "relative_dreward"}  # fmt: skip


def merge_and_show(
    model: str,
    out: Path,
    *,
    adapters: Sequence[tuple[Path, float]],
    dtype: str | None,
    policy: Policy,
    graft: bool = False,
    prompts: int,
    console: Console | None = None,
) -> MergeFacts:
    """Merge as `merge_model` does and print what came of it.

    Raises: UserError and its children; BeyondLimit after its figures were printed.
    """
    console = console or Console()
    try:
        facts = merge_model(
            model,
            out,
            adapters=adapters,
            dtype=dtype,
            policy=policy,
            graft=graft,
            prompts=prompts,
            observer=ConsoleObserver(console),
        )
    except BeyondLimit as error:
        show_certificate(console, error.certificate, policy)
        raise
    kinds = ", ".join(f"{one['kind']} {one['folder']} x {one['weight']:g}" for one in facts.adapters)
    say(console, f"{out}: {facts.tensors} tensors, {byte_size(facts.bytes, 'GB', '.3g')}, {facts.dtype}")
    say(console, f"  base      {facts.base['name']} ({policy})")
    say(console, f"  merged    {kinds}; {facts.tensors - facts.changed} tensors are the base's own")
    if facts.graft is not None:
        whole, replaced = facts.graft["tensors"], facts.graft["replaced"]
        where = f"among the files of {facts.graft['name']}"
        say(console, f"  graft     {where}: {whole - replaced} of {whole} tensors are its own")
    if facts.certificate is None:
        say(console, f"  {NO_CERTIFICATE}")
    else:
        show_certificate(console, facts.certificate, policy)
    return facts


def show_certificate(console: Console, certificate: dict[str, Any], policy: str) -> None:
    """The figures of a certificate as a table, the merge itself first, and whether they are within their limit."""
    live, limit = certificate["live"], certificate["limit"]
    title = f"Merged against live ({live['quantize'] or 'not quantized'}, {live['compute']})"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    columns = REWARD_COLUMNS if limit["measure"] in REWARD_COLUMNS.values() else COLUMNS
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    labels = {"base": f"{live['quantize']} base"}  # against the base itself: what quantizing alone costs
    for name, one in {policy: certificate["merged"], **certificate["compared"]}.items():
        figures = [format(one[key], ".2%" if key == "top1_agreement" else ".2g") for key in columns.values()]
        table.add_row(labels.get(name, name), *figures, style="bold" if name == policy else None)
    console.print(table)
    verdict = "passed" if certificate["passed"] else "FAILED"
    where = f"{certificate['prompts']} prompts, {certificate['positions']:,} positions of {certificate['rows']}"
    say(console, f"  {verdict}: {limit['measure']} at most {limit['at_most']:.3g} ({limit['why']}); {where}")
