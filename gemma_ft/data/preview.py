"""Prepared examples as coloured tokens in a terminal, and the checks that every example must pass."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from gemma_ft.data.chat import IGNORE, ChatEncoder
from gemma_ft.data.dataset import Example, Prepared
from gemma_ft.data.template import BOS, END_OF_TURN
from gemma_ft.data.tokenizer import BYTE_PIECE

# Neighbouring tokens alternate between two shades, so that each token's borders can be seen.
STYLES = {
    "trained": ("bold green", "green"),
    "masked": ("grey70", "grey50"),
    "control": ("magenta", "magenta"),
    "control, trained": ("bold black on green", "bold black on green"),
}
BRACKETS = "⟦", "⟧"  # around trained tokens, where there are no colours
LINE_BREAK = "↵"
FAULTS_SHOWN = 5
DOCUMENTS_SHOWN = 3
HEAD_TOKENS, TAIL_TOKENS = 400, 100


def preview(prepared: Prepared, encoder: ChatEncoder, *, rows: int = 3, console: Console | None = None) -> bool:
    """Prints legend, the first `rows` examples as coloured tokens, counts and checks; True when every check passed.

    The checks cover all examples, not only those shown.
    """
    console = console or Console()
    marks = console.color_system is None
    console.print(_legend(marks))
    for number, example in enumerate(prepared.examples[:rows], start=1):
        wheres = prepared.examples.wheres(number - 1)
        trained = sum(label != IGNORE for label in example["labels"])
        size = len(example["input_ids"])
        share = f"{trained} trained ({trained / size:.0%})"
        title = f"example {number} of {len(prepared.examples):,} · {size} tokens · {share}"
        console.print(Rule(Text(title, style="bold cyan"), align="left", style="cyan"))
        for document, ids, labels in _documents(example):
            if document == DOCUMENTS_SHOWN:
                console.print(Text(f"... and {len(wheres) - document} more in this example", style="cyan"))
                break
            console.print(Text(f"document {document + 1} · {wheres[document]} · {len(ids)} tokens", style="cyan"))
            console.print(Padding(token_text(ids, labels, encoder, marks=marks), (0, 0, 1, 2)))
    console.print(Rule(style="cyan"))
    console.print(Text(prepared.stats.describe()))
    faults = find_faults(prepared.examples, encoder)
    console.print(_verdict(prepared, faults))
    return not faults


def find_faults(examples: Sequence[Example], encoder: ChatEncoder) -> list[str]:
    """What is wrong with the examples, one line each: BOS not exactly once and first in a document, an answer whose
    terminator is not trained, a label that is not its own token, an example with nothing trained."""
    control = encoder.control
    faults: list[str] = []
    answers = terminators = 0
    for number, example in enumerate(examples, start=1):
        if all(label == IGNORE for label in example["labels"]):
            faults.append(f"example {number}: no token is trained")
        for document, ids, labels in _documents(example):
            place = f"example {number}, document {document + 1}"
            if ids.count(control.bos) != 1 or ids[0] != control.bos:
                faults.append(f"{place}: {BOS} occurs {ids.count(control.bos)} times, expected once, at the start")
            if labels[0] != IGNORE:
                faults.append(f"{place}: the first token is trained, it would be predicted from the document before")
            if any(label not in (IGNORE, token) for token, label in zip(ids, labels, strict=True)):
                faults.append(f"{place}: a label differs from its token")
            ends = [at for at, token in enumerate(ids) if token == control.end_of_turn]
            untrained = [at for at in ends if labels[at] == IGNORE and labels[at - 1] != IGNORE]
            if untrained:
                faults.append(f"{place}: an answer is trained without its {END_OF_TURN}")
            answers += control.start_of_turn in ids
            terminators += sum(labels[at] != IGNORE for at in ends)
    if answers and not terminators:
        faults.append(f"no {END_OF_TURN} is trained in any example: the model would never stop")
    return faults


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
    result = Text()
    inside = False
    for number, (kind, piece) in enumerate(_pieces(ids, labels, encoder)):
        trained = kind.endswith("trained")
        if marks and trained != inside:
            result.append(BRACKETS[0] if trained else BRACKETS[1])
        inside = trained
        result.append(_visible(piece), style=STYLES[kind][number % 2])
    if marks and inside:
        result.append(BRACKETS[1])
    result.rstrip()
    return result


def _pieces(ids: Sequence[int], labels: Sequence[int], encoder: ChatEncoder) -> Iterator[tuple[str, str]]:
    """(kind, text) of each token; the bytes of one character that is no piece of its own come as one text."""
    names = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    tokens = [(_kind(token, label, encoder), name) for token, label, name in zip(ids, labels, names, strict=True)]
    for (kind, is_byte), group in groupby(tokens, key=lambda token: (token[0], bool(BYTE_PIECE.fullmatch(token[1])))):
        if is_byte:
            yield kind, bytes(int(name[3:5], 16) for _, name in group).decode("utf-8", errors="replace")
        else:
            yield from ((kind, name.replace("\u2581", " ")) for _, name in group)


def _kind(token: int, label: int, encoder: ChatEncoder) -> str:
    if token in encoder.content.control_ids:
        return "control" if label == IGNORE else "control, trained"
    return "masked" if label == IGNORE else "trained"


def _visible(piece: str) -> str:
    """Printable text: nothing in a data row can move the cursor or change the terminal."""
    shown = "".join(chr(0x2400 + ord(sign)) if ord(sign) < 32 and sign not in "\n\t" else sign for sign in piece)
    shown = "".join("\ufffd" if 0x7F <= ord(sign) < 0xA0 else sign for sign in shown)
    return shown.replace("\n", f"{LINE_BREAK}\n").replace("\t", "→   ")


def _documents(example: Example) -> Iterator[tuple[int, list[int], list[int]]]:
    """(number, ids, labels) of each document packed into an example."""
    rows = zip(example["document_ids"], example["input_ids"], example["labels"], strict=True)
    for document, group in groupby(rows, key=lambda row: row[0]):
        tokens = list(group)
        yield document, [token for _, token, _ in tokens], [label for _, _, label in tokens]


def _legend(marks: bool) -> Text:
    if marks:
        return Text(f"tokens: {BRACKETS[0]}trained{BRACKETS[1]}, others masked   {LINE_BREAK} line break")
    legend = Text("tokens: ")
    for kind, styles in STYLES.items():
        legend.append(kind[: len(kind) // 2], style=styles[0])
        legend.append(kind[len(kind) // 2 :], style=styles[1])
        legend.append("   ")
    return legend.append(f"{LINE_BREAK} line break", style="grey50")


def _verdict(prepared: Prepared, faults: Sequence[str]) -> Text:
    if faults:
        text = Text()
        for fault in faults[:FAULTS_SHOWN]:
            text.append(f"✗ {fault}\n", style="bold red")
        if len(faults) > FAULTS_SHOWN:
            text.append(f"✗ ... and {len(faults) - FAULTS_SHOWN} more\n", style="bold red")
        return text
    ends = prepared.stats.terminators
    lines = [f"{BOS} once in each of {prepared.stats.documents:,} sequences, at the start"]
    lines += [f"{END_OF_TURN} is trained {ends:,} times"] if ends else ["plain text: no turns, every token is trained"]
    lines += ["every example has trained tokens"]
    return Text("\n".join(f"✓ {line}" for line in lines), style="green")
