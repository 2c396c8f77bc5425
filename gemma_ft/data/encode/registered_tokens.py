"""Gemma's own added tokens, for a tokenizer that has them in its vocabulary alone.

Early conversions of Gemma 1's tokenizer.model list four added tokens (pad, eos, bos, unk). What SentencePiece finds in
a text by its characters (USER_DEFINED pieces: turn tokens, runs of blanks, HTML tags) is then no more than a piece that
merges may or may not lead to: a chat template's turn tokens come out in seven pieces, and 32 line breaks as others than
in SentencePiece, llama.cpp and every later conversion.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken

from gemma_ft.data.encode.template import chat_of
from gemma_ft.data.encode.tokenizer_facts import HTML_TAGS, SPACE_SIGN

LONGEST_RUN = 31  # of one blank, as a piece
UNUSED = 100
OTHERS = ("<mask>", "<2mass>", "[@BOS@]", "[toxicity=0]")


def lacks_tokens(tokenizer: Any) -> bool:
    """Whether a transformers tokenizer has turn tokens in its vocabulary, but not among its added tokens."""
    return chat_of(tokenizer).start_of_turn not in tokenizer.added_tokens_encoder


def register_tokens(tokenizer: Any) -> None:
    """Make added tokens of what is one in Gemma and in this tokenizer's vocabulary, with the ids that it has there.

    Runs of spaces are looked for in the text as it is after normalization: these conversions rank merges by the id of
    the piece, and so would cut 32 spaces otherwise than SentencePiece (31 first, then the rest).
    Source: the added tokens of Gemma 2's published tokenizer.json, whose vocabulary is Gemma 1's; the turn tokens are
    special there, the rest is not.
    """
    backend, control = tokenizer.backend_tokenizer, chat_of(tokenizer).control_tokens
    runs = [
        blank * count
        for blank in ("\n", "\t", SPACE_SIGN)
        for count in range(1 if blank == "\n" else 2, LONGEST_RUN + 1)
    ]
    tags = [f"<{slash}{tag}>" for tag in HTML_TAGS for slash in ("", "/")]
    unused = [f"<unused{number}>" for number in range(UNUSED)]
    names = [*control, *OTHERS, *unused, *runs, *tags]
    special = {*control, tokenizer.mask_token}  # what transformers makes of them when it opens them again
    known = [(number, name) for name in names if (number := backend.token_to_id(name)) is not None]
    tokenizer.add_tokens(
        [AddedToken(name, normalized=name[0] == SPACE_SIGN, special=name in special) for _, name in sorted(known)]
    )
