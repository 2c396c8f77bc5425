"""The prompts of a certificate: held-out rows of the run, or synthetic ones where there are none any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemma_ft.build.data import build_data
from gemma_ft.build.pretrained import tokenizer_of
from gemma_ft.data.conversation import Pair
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.arrange import prepare
from gemma_ft.errors import UserError, first_line
from gemma_ft.export.merge.merged import MergedWeights
from gemma_ft.system.limits import IGNORE

SYNTHETIC_TOKENS = 64


@dataclass(frozen=True)
class CertificatePrompt:
    """Token ids of one row, and the positions whose next token is compared: those before each token of an answer."""

    ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class CertificatePrompts:
    """Rows to compare two models on, where they come from, in words, and whether they are random tokens."""

    prompts: Sequence[CertificatePrompt]
    source: str
    random: bool = False


def certificate_prompts(merged: MergedWeights, count: int) -> CertificatePrompts:
    """At most `count` held-out rows of the run that the adapter lies in, each whole and by itself.

    Random tokens stand in when the adapter lies in no run, or its rows are not where the recipe says.
    """
    tokenizer = tokenizer_of(merged.place)
    recipe, why = merged.place.recipe, "the adapter lies in no run"
    if recipe is not None:
        try:
            data = build_data(recipe, tokenizer)
            if data.held_out is not None:
                items = [one.halves[0] if isinstance(one, Pair) else one for one in data.held_out_items[:count]]
                kept = prepare(items, data.encoder, max_seq_len=recipe.data.max_seq_len, packing=False)
                rows = kept.examples[:count]  # a long document is several
                return CertificatePrompts(
                    [_probe(one["input_ids"], one["labels"]) for one in rows], str(data.eval_source)
                )
            why = "the recipe holds no rows out"
        except UserError as error:
            why = first_line(error)
    return CertificatePrompts(_synthetic(ChatEncoder(tokenizer), count), f"random tokens: {why}", random=True)


def _probe(ids: list[int], labels: list[int]) -> CertificatePrompt:
    return CertificatePrompt(ids, [place - 1 for place, label in enumerate(labels) if label != IGNORE])


def _synthetic(encoder: ChatEncoder, count: int) -> list[CertificatePrompt]:
    """Rows of BOS and random text tokens, the same each time."""
    words = sorted(set(encoder.tokenizer.get_vocab().values()) - encoder.content.control_ids)
    draw = torch.randint(len(words), (count, SYNTHETIC_TOKENS - 1), generator=torch.Generator().manual_seed(0))
    rows = [[encoder.control.bos, *(words[place] for place in row)] for row in draw.tolist()]
    return [CertificatePrompt(row, list(range(len(row)))) for row in rows]
