"""`gemma-ft export` as a person sees it: what would be done, or what was written, with sizes; then the upload."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from gemma_ft.export.export import Export, ExportOptions, export_model, plan_export, upload
from gemma_ft.system.units import byte_size
from gemma_ft.ui.merge import show_certificate
from gemma_ft.ui.progress import ConsoleObserver, say


def export_and_show(
    source: str, options: ExportOptions, *, dry_run: bool = False, console: Console | None = None, api: Any = None
) -> None:
    """Write a model in another form and upload it when asked, and print what is done; `dry_run`: only print it.

    api: an HfApi for the upload. Raises: UserError and its children in one line; nothing half-written is left.
    """
    console = console or Console()
    if dry_run:
        export = plan_export(source, options)
        say(console, f"export {source} to {options.out}, dry run: nothing is written or sent")
        show_steps(console, export)
    else:
        export = export_model(source, options, observer=ConsoleObserver(console))
        show_files(console, export)
    for note in export.form.notes():
        say(console, f"note: {note}")
    if options.push is not None and not dry_run:
        say(console, f"uploaded to {upload(export, api=api)} ({export.visibility})")


def show_steps(console: Console, export: Export) -> None:
    """What will be done, with the files of each step."""
    for number, step in enumerate(export.steps, start=1):
        say(console, f"{number}. {step.what}")
        for name, size in step.files.items():
            _file(console, size, name)


def show_files(console: Console, export: Export) -> None:
    """What was written, and the certificate of its merge where it has one."""
    sizes = {path.name: path.stat().st_size for path in export.files}
    say(console, f"{export.form.out}: {len(sizes)} files, {byte_size(sum(sizes.values()), None, '.1f')}")
    for name, size in sizes.items():
        _file(console, size, name)
    if export.facts is not None and export.facts["certificate"] is not None:
        show_certificate(console, export.facts["certificate"], export.facts["policy"])


def _file(console: Console, size: int | None, name: str) -> None:
    text = byte_size(size, None, ".1f") if size is not None else "-"  # not known before it is written
    say(console, f"     {text:>10}  {name}")
