"""`gemma-ft export` in reading order: look, write, say what came of it, upload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from gemma_ft.build.place import place_of
from gemma_ft.data.encode.tokenizer import HUB_ID
from gemma_ft.errors import UserError
from gemma_ft.export.card.model_card import Form as FormName
from gemma_ft.export.formats import AdapterForm, Form, GgufForm, HfForm, Step
from gemma_ft.export.gguf_file import GgufType
from gemma_ft.export.hf_folder import check_free
from gemma_ft.export.metadata import Papers
from gemma_ft.export.push import check_name, push
from gemma_ft.ui.merge import DTYPES, show_certificate


@dataclass(frozen=True)
class Wish:
    """What a user asks of an export; the names are those of the options."""

    to: FormName
    out: Path
    gguf_type: GgufType | None = None
    dtype: str | None = None
    base_id: str | None = None
    push: str | None = None
    public: bool = False

    def check(self) -> None:
        """Raises UserError for options that do not go together, before anything is read."""
        if self.gguf_type is not None and self.to != "gguf":
            raise UserError(f"--gguf-type: goes with --to gguf, not with --to {self.to}")
        if self.dtype is not None and self.to != "hf":
            also = "; --gguf-type says how a GGUF file stores its weights" if self.to == "gguf" else ""
            raise UserError(f"--dtype: goes with --to hf, not with --to {self.to}{also}")
        if self.base_id is not None and self.to != "adapter":
            raise UserError(f"--base-id: goes with --to adapter, not with --to {self.to}")
        if self.base_id is not None and not HUB_ID.fullmatch(self.base_id):
            raise UserError(f"--base-id {self.base_id}: expected OWNER/NAME, as on the hub")
        if self.public and self.push is None:
            raise UserError("--public: goes with --push OWNER/NAME")
        if self.push is not None:
            check_name(self.push)
        if self.push is not None and self.out.suffix == ".gguf":
            raise UserError(
                f"--push: {self.out.name} would go without model card and notice; name a folder: --out {self.out.stem}"
            )


def export_model(
    source: str, wish: Wish, *, dry_run: bool = False, console: Console | None = None, api: Any = None
) -> None:
    """Write a model in another form and upload it when asked; prints what is done. `dry_run`: only prints it.

    api: an HfApi for the upload. Raises: UserError and its children in one line; nothing half-written is left.
    """
    console = console or Console()
    wish.check()
    check_free(wish.out)  # before tokenizers and weights are read
    form = _form(source, wish)
    if dry_run:
        _say(console, f"export {source} to {wish.out}, dry run: nothing is written or sent")
        steps = form.steps()
        for number, step in enumerate([*steps, *_push_step(steps, wish)], start=1):
            _say(console, f"{number}. {step.what}")
            for name, size in step.files.items():
                _say(console, f"     {_bytes(size):>10}  {name}")
    else:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
            facts = form.write(_bar(shown))
        files = written(form)
        _say(console, f"{form.out}: {len(files)} files, {_bytes(sum(path.stat().st_size for path in files))}")
        for path in files:
            _say(console, f"     {_bytes(path.stat().st_size):>10}  {path.name}")
        if facts is not None and facts["certificate"] is not None:
            show_certificate(console, facts["certificate"], facts["policy"])
    for note in form.notes():
        _say(console, f"note: {note}")
    if wish.push is not None and not dry_run:
        address = push(form.out, [path.name for path in written(form)], wish.push, public=wish.public, api=api)
        _say(console, f"uploaded to {address} ({_visibility(wish)})")


def written(form: Form) -> list[Path]:
    """The files of a finished export, by name."""
    if isinstance(form, GgufForm) and form.alone:
        return [form.out.parent / form.modelfile, form.out]
    return sorted(form.out.iterdir())


def _form(source: str, wish: Wish) -> Form:
    place = place_of(source)
    papers = Papers.of(place, wish.push or wish.out.name, wish.base_id)
    if wish.to == "gguf":
        return GgufForm(place, papers, wish.out, wish.gguf_type)
    if wish.to == "adapter":
        if wish.push is not None and wish.base_id is None and Path(place.base.name).is_absolute():
            raise UserError(
                f"--push: the adapter's base is the local folder {place.base.name}, which nobody else has; name the "
                "same weights on the hub with --base-id OWNER/NAME, or use --to hf"
            )
        return AdapterForm(place, papers, wish.out, wish.base_id)
    return HfForm(place, papers, wish.out, DTYPES[wish.dtype] if wish.dtype is not None else None)


def _push_step(steps: Sequence[Step], wish: Wish) -> list[Step]:
    if wish.push is None:
        return []
    sizes = [size for step in steps for size in step.files.values()]
    total = _bytes(sum(size or 0 for size in sizes))
    return [Step(f"upload {len(sizes)} files, {total}, to {wish.push} ({_visibility(wish)})", {})]


def _visibility(wish: Wish) -> str:
    return "public" if wish.public else "private"


def _bar(shown: Progress) -> Callable[[str], Callable[[int, int], None]]:
    """Makes a bar for something that is done, once its first step is done."""

    def make(what: str) -> Callable[[int, int], None]:
        tasks: list[Any] = []

        def update(done: int, total: int) -> None:
            tasks.extend([] if tasks else [shown.add_task(what, total=total)])
            shown.update(tasks[0], completed=done)

        return update

    return make


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
