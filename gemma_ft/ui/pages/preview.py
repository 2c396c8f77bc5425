"""The page of a preview: what a recipe would train on, token by token and in figures, before a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy

from gemma_ft.data.check.overview import Overview, histogram
from gemma_ft.data.check.preview import Preview
from gemma_ft.data.check.preview_tokens import KINDS, LINE_BREAK, ShownDocument, Token, cut_tokens, tokens_of
from gemma_ft.errors import DiskError, UserError
from gemma_ft.system.files import is_disk_full, replace_text
from gemma_ft.system.units import count, percent
from gemma_ft.ui.pages.blocks import Block, Cards, Note, Picture, Section, Table, Tokens, render
from gemma_ft.ui.pages.curves import histogram_picture
from gemma_ft.ui.pages.page import is_page

HEAD_TOKENS, TAIL_TOKENS = 1200, 300  # of a document
FAULTS_SHOWN = 50
SHARE_BIN = 5  # percent
PAGES = (".html", ".htm")
BOUNDARY = "boundary"  # the kind of a document's title, beside KINDS


def check_page(out: Path) -> None:
    """Nothing where a page can be written. Raises: UserError where there is no folder for it, or something that is no
    page is in its place.
    """
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name another file with --html")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file in it with --html")
    if out.exists() and out.suffix.lower() not in PAGES and not is_page(out):
        raise UserError(f"{out}: is there and is no page; name a file that ends in .html with --html")


def write_preview(preview: Preview, out: Path, *, recipe: Path) -> Path:
    """Write the page to `out`, whole or not at all, over an older one; returns `out`. `recipe`: what was looked at.

    Raises: UserError as `check_page`; DiskError when there is no room.
    """
    check_page(out)
    page = render(f"Preview of {recipe.name}", str(recipe), sections_of(preview))
    try:
        replace_text(out, page)
    except OSError as error:
        if is_disk_full(error):
            raise DiskError(f"{out}: no space left for it; free some and run again") from error
        raise UserError(f"{out}: cannot be written: {error.strerror}; name another file with --html") from error
    return out


def sections_of(preview: Preview) -> list[Section]:
    """The sections of the page, in reading order."""
    return [
        Section("", [_headline(preview), Note(f"format: {preview.format}"), Note(preview.describe())]),
        Section("Checks", _checks(preview)),
        Section("Examples, token by token", _examples(preview)),
        Section("Documents and examples", _pictures(preview)),
        Section("Sources", [_sources(preview.overview)]),
    ]


def _headline(preview: Preview) -> Block:
    stats = preview.stats
    per_example = stats.documents / stats.packed_rows
    return Cards(
        [
            (f"tokens in {preview.span}", count(stats.tokens), f"{count(stats.documents)} documents"),
            ("trained", percent(stats.trained_tokens / stats.tokens), f"{count(stats.trained_tokens)} tokens"),
            ("packing efficiency", percent(stats.fill), f"{per_example:.1f} documents in an example"),
            (
                f"optimizer steps in {preview.span}",
                count(preview.steps),
                f"{count(stats.packed_rows)} examples, {count(preview.global_batch_size)} in a step",
            ),
            ("truncated", count(stats.truncated), f"{count(preview.overview.cut_tokens)} tokens cut off"),
            ("dropped", count(stats.dropped + stats.too_long + stats.dropped_empty), f"of {count(stats.rows)} rows"),
        ]
    )


def _checks(preview: Preview) -> list[Block]:
    warnings: list[Block] = [Note(f"! {line}", warning=True) for line in preview.warnings()]
    if not preview.faults:
        return [Note("\n".join(f"✓ {line}" for line in preview.passed())), *warnings]
    lines = [f"✗ {fault}" for fault in preview.faults[:FAULTS_SHOWN]]
    if (more := len(preview.faults) - FAULTS_SHOWN) > 0:
        lines.append(f"✗ ... and {count(more)} more")
    return [Note("\n".join(lines), warning=True), *warnings]


def _examples(preview: Preview) -> list[Block]:
    blocks: list[Block] = [
        Tokens("", _legend()),
        Note("Neighbouring tokens have two shades, so that their borders are seen. Point at a token to see its id."),
        *(Note(note) for note in preview.notes),
    ]
    for example in preview.shown:
        shown = [one for document in example.documents for one in _document(document, preview)]
        if example.others:
            shown.append((BOUNDARY, f"... and {count(example.others)} more documents in this example", ""))
        blocks.append(Tokens(example.title, shown))
    return blocks


def _legend() -> list[tuple[str, str, str]]:
    named = [(_css(kind), kind, "") for kind in KINDS]
    named += [(BOUNDARY, "document boundary", ""), ("plain", f"{LINE_BREAK} line break", "")]
    return [one for pair in named for one in (pair, ("plain", "   ", ""))][:-1]


def _document(document: ShownDocument, preview: Preview) -> list[tuple[str, str, str]]:
    """A document with its title in front, and what was cut off before and behind it."""
    encoder, ids, labels = preview.encoder, document.ids, document.labels
    shown = [(BOUNDARY, document.title, "")]
    if document.before:
        shown += [*_spans(cut_tokens(document.before, encoder)), _remark(f"✂ {document.before.describe('before')}")]
    hidden = len(ids) - HEAD_TOKENS - TAIL_TOKENS
    if hidden > 0:
        shown += _spans(tokens_of(ids[:HEAD_TOKENS], labels[:HEAD_TOKENS], encoder))
        shown.append(_remark(f"... {count(hidden)} tokens not shown ..."))
        ids, labels = ids[-TAIL_TOKENS:], labels[-TAIL_TOKENS:]
    shown += _spans(tokens_of(ids, labels, encoder))
    if document.after:
        shown += [_remark(f"✂ {document.after.describe('past')}"), *_spans(cut_tokens(document.after, encoder))]
    return shown


def _spans(tokens: Iterable[Token]) -> list[tuple[str, str, str]]:
    return [(_css(token.kind), token.text, " ".join(map(str, token.ids))) for token in tokens]


def _remark(text: str) -> tuple[str, str, str]:
    return "remark", text, ""


def _css(kind: str) -> str:
    return kind.replace(",", "")


def _pictures(preview: Preview) -> list[Block]:
    """How long documents are, how much of each is trained, how full examples are."""
    found, limit = preview.overview, preview.stats.max_seq_len
    shares = numpy.maximum(numpy.ceil(found.shares * 100), 1).astype(numpy.int64)
    of_shares = numpy.bincount((shares - 1) // SHARE_BIN, minlength=100 // SHARE_BIN).tolist()
    lengths, fills = histogram(found.lengths), histogram(numpy.array(preview.lengths))
    label = "tokens of a document, before any cut"
    if lengths.beyond:
        label += f" (the last bar: also {count(lengths.beyond)} longer, up to {count(int(found.lengths.max()))})"
    mark = (limit, f"max_seq_len {count(limit)}")
    drawn = [
        (
            histogram_picture(lengths.counts, lengths.width, title="Documents by length", x_label=label, mark=mark),
            "How many documents have how many tokens",
        ),
        (
            histogram_picture(of_shares, SHARE_BIN, title="Documents by trained share", x_label="% of tokens trained"),
            "How many documents have how large a share of trained tokens",
        ),
        (
            histogram_picture(
                fills.counts, fills.width, title="Examples by length", x_label="tokens of an example", mark=mark
            ),
            "How many examples have how many tokens",
        ),
    ]
    return [Picture(uri, alt) for uri, alt in drawn]


def _sources(found: Overview) -> Block:
    headers = ["source", "rows", "documents", "tokens", "trained", "trained share", "truncated"]
    rows = [
        [
            one.name,
            *map(count, (one.rows, one.documents, one.tokens, one.trained)),
            percent(one.share),
            count(one.truncated),
        ]
        for one in found.sources
    ]
    return Table(headers, rows)
