"""Prompts in, greedy answers out, through transformers' `generate` and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """Generated token ids without the stop token; `stopped` is False where max_new_tokens cut the answer off."""

    ids: list[int]
    stopped: bool


@torch.no_grad()
def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Greedy answers to prompts (token ids that end where the model speaks), in the order of the prompts.

    Prompts of similar length share a left-padded batch. The model is in eval mode meanwhile and as it was afterwards.
    """
    was_training = model.training
    model.eval()
    answers: dict[int, Answer] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch_size):
        indices = by_length[start : start + batch_size]
        longest = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            use_cache=True,
        )[:, longest:].tolist()
        for row, i in enumerate(indices):
            end = next((k for k, token in enumerate(out[row]) if token in stop_ids), None)
            answers[i] = Answer(out[row][:end], end is not None)
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]
