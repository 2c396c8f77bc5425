"""A preview in a terminal: tokens coloured by what becomes of them, or marked where there are no colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

from gemma_ft.build.data_check import preview_recipe
from gemma_ft.data.check.overview import Overview, histogram
from gemma_ft.data.check.preview import Preview
from gemma_ft.data.check.preview_tokens import LINE_BREAK, Cut, ShownDocument, Token, cut_tokens, tokens_of, visible
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.recipe.load import LoadedRecipe

# Neighbouring tokens alternate between two shades, so that each token's borders can be seen.
STYLES = {
    "trained": ("bold green", "green"),
    "masked": ("grey70", "grey50"),
    "control": ("magenta", "magenta"),
    "control, trained": ("bold black on green", "bold black on green"),
    "truncated": ("strike red", "strike dark_red"),
}
BRACKETS = {"trained": "⟦⟧", "control, trained": "⟦⟧", "truncated": "⟨⟩"}  # where there are no colours
BOUNDARY = "──"
WIDE = 100  # columns from which on the two halves of a pair stand side by side
FAULTS_SHOWN = 5
SOURCES_SHOWN = 20
HEAD_TOKENS, TAIL_TOKENS = 400, 100
BARS = " ▁▂▃▄▅▆▇█"


def preview_and_show(loaded: LoadedRecipe, *, rows: int, row_ids: Sequence[str] = ()) -> Preview:
    """Print what a recipe would train on: the first `rows` examples, or those that hold some rows. Returns it.

    Raises: DataError, also for a row that is not there.
    """
    for note in loaded.notes:
        print(f"note: {note}")
    preview = preview_recipe(loaded.recipe, rows=rows, row_ids=row_ids)
    show(preview)
    return preview


def show(preview: Preview, console: Console | None = None) -> None:
    """Prints legend, examples as coloured tokens, counts and checks."""
    console = console or Console()
    marks = console.color_system is None
    if preview.format:
        console.print(Text(f"format: {preview.format}"))
    console.print(_legend(marks))
    for example in preview.shown:
        console.print(Rule(Text(example.title, style="bold cyan"), align="left", style="cyan"))
        beside = example.paired and console.width >= WIDE
        for document in example.documents[:1] if beside else example.documents:
            console.print(_headed(document, preview.encoder, marks))
        if beside:
            halves = Table.grid(Column(ratio=1), Column(ratio=1), padding=(0, 2, 0, 0), expand=True)
            halves.add_row(*(_headed(half, preview.encoder, marks) for half in example.documents[1:]))
            console.print(halves)
        if example.others:
            console.print(Text(f"... and {example.others} more in this example", style="cyan"))
    console.print(Rule(style="cyan"))
    for note in preview.notes:
        console.print(Text(note))
    console.print(Text(preview.describe()))
    console.print(Text(_lengths(preview.overview)))
    if len(preview.overview.sources) > 1:
        console.print(_sources(preview.overview))
    console.print(_verdict(preview))
    for line in preview.warnings():
        console.print(Text(f"! {visible(line)}", style="yellow"))


def token_text(ids: Sequence[int], labels: Sequence[int], encoder: ChatEncoder, *, marks: bool = False) -> Text:
    """One document as coloured text; with `marks`, brackets stand around what is trained.

    Line breaks are shown and kept, other control characters become visible signs; of a long document the middle is left
    out.
    """
    hidden = len(ids) - HEAD_TOKENS - TAIL_TOKENS
    if hidden > 0:
        head = token_text(ids[:HEAD_TOKENS], labels[:HEAD_TOKENS], encoder, marks=marks)
        tail = token_text(ids[-TAIL_TOKENS:], labels[-TAIL_TOKENS:], encoder, marks=marks)
        return Text.assemble(head, (f"\n... {hidden:,} tokens not shown ...\n", "cyan"), tail)
    return _coloured(tokens_of(ids, labels, encoder), marks)


def _coloured(tokens: Iterable[Token], marks: bool) -> Text:
    result = Text()
    inside = ""
    for number, token in enumerate(tokens):
        around = BRACKETS.get(token.kind, "") if marks else ""
        if around != inside:
            result.append(inside[1:] + around[:1])
        inside = around
        result.append(token.text, style=STYLES[token.kind][number % 2])
    result.rstrip()
    return result.append(inside[1:])


def _headed(document: ShownDocument, encoder: ChatEncoder, marks: bool) -> Group:
    """A document under its title."""
    title = Text(f"{BOUNDARY} {document.title}", style="cyan")
    return Group(title, Padding(_document(document, encoder, marks), (0, 0, 1, 2)))


def _document(document: ShownDocument, encoder: ChatEncoder, marks: bool) -> Text:
    """A document with what was cut off before and behind it."""
    text = token_text(document.ids, document.labels, encoder, marks=marks)
    if document.before:
        text = Text.assemble(_cut(document.before, "before", encoder, marks), "\n", text)
    if document.after:
        text = Text.assemble(text, "\n", _cut(document.after, "past", encoder, marks))
    return text


def _cut(cut: Cut, side: str, encoder: ChatEncoder, marks: bool) -> Text:
    tokens = _coloured(cut_tokens(cut, encoder), marks)
    line = Text(f"✂ {cut.describe(side)}", style="red")
    return Text.assemble(*((tokens, "\n", line) if side == "before" else (line, "\n", tokens)))


def _legend(marks: bool) -> Text:
    legend = Text("tokens: ")
    if marks:
        named = ", ".join(f"{BRACKETS[kind][0]}{kind}{BRACKETS[kind][1]}" for kind in ("trained", "truncated"))
        legend.append(f"{named}, others masked   ")
    else:
        for kind, styles in STYLES.items():
            legend.append(kind[: len(kind) // 2], style=styles[0])
            legend.append(kind[len(kind) // 2 :], style=styles[1])
            legend.append("   ")
    legend.append(f"{BOUNDARY} document", style="cyan")
    return legend.append(f"   {LINE_BREAK} line break", style="grey50")


def _lengths(overview: Overview) -> str:
    """Documents by length in one line: a bar for each bin."""
    bins = histogram(overview.lengths)
    most = max(bins.counts)
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in bins.counts)
    beyond = f"; the last bar: also {bins.beyond:,} longer" if bins.beyond else ""
    ends = f"from {overview.lengths.min():,} to {overview.lengths.max():,}"
    return f"documents by length: 1 |{bars}| {bins.width * len(bins.counts):,} tokens{beyond}; {ends}"


def _sources(overview: Overview) -> Table:
    table = Table(Column("source", overflow="fold"), box=None, header_style="cyan", pad_edge=False)
    for header in ("rows", "documents", "tokens", "trained", "truncated"):
        table.add_column(header, justify="right")
    for one in overview.sources[:SOURCES_SHOWN]:
        figures = [f"{figure:,}" for figure in (one.rows, one.documents, one.tokens)]
        table.add_row(Text(one.name), *figures, f"{one.share:.0%}", f"{one.truncated:,}")
    if (more := len(overview.sources) - SOURCES_SHOWN) > 0:
        table.add_row(f"... and {more} more")
    return table


def _verdict(preview: Preview) -> Text:
    if not preview.faults:
        return Text("\n".join(f"✓ {line}" for line in preview.passed()), style="green")
    text = Text()
    for fault in preview.faults[:FAULTS_SHOWN]:
        text.append(f"✗ {fault}\n", style="bold red")
    if len(preview.faults) > FAULTS_SHOWN:
        text.append(f"✗ ... and {len(preview.faults) - FAULTS_SHOWN} more\n", style="bold red")
    return text
