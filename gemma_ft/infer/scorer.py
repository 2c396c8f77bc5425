"""A reward model with everything that scoring needs, and the rewards that it gives.

Letters: B sequences that are read together, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_ft.build.contract import asking_encoder
from gemma_ft.build.new_tokens import check_rows, embedding_rows
from gemma_ft.build.place import Place, place_of
from gemma_ft.build.pretrained import model_at, tokenizer_of
from gemma_ft.data.conversation import Conversation
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.system import hardware


@dataclass(frozen=True)
class Scorer:
    """A reward model, and how its answers are written."""

    place: Place
    model: Any
    encoder: ChatEncoder

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that it was made for, in tokens."""
        return int(self.place.of_base.config.max_position_embeddings)

    def rewards(self, sequences: Sequence[Sequence[int]], *, batch_size: int) -> list[float]:
        """See `rewards_of`."""
        return rewards_of(self.model, sequences, pad_id=self.encoder.control.pad, batch_size=batch_size)


def open_scorer(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = "auto",
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Scorer:
    """A reward model from a run directory, an adapter, a model folder or a hub id; options as `open_session`.

    Raises: UserError when there is none, it is a language model, or it would not be asked as it was trained.
    """
    place = place_of(path, adapter)
    check_scores(place, path if adapter is None else adapter)
    encoder = asking_encoder(tokenizer_of(place), path, place.contract, place.of_base.folder)
    check_rows(encoder, embedding_rows(place), path)
    if encoder.system_policy == "error" and place.contract is None:  # as where it is asked for text
        encoder = encoder.but(system="fold")
    dtype = dtype or hardware.dtype_by_name(place.trained_in)
    return Scorer(place, model_at(place, dtype=dtype, quantize=quantize, device=device), encoder)


def check_scores(place: Place, name: str | Path) -> None:
    """Raises: UserError for a model that writes text where a reward is wanted."""
    if not place.reward:
        raise UserError(
            f"{name}: a language model, which gives no rewards; name a run of objective.kind: reward, or its adapter "
            "or merged folder"
        )


def scored_ids(encoder: ChatEncoder, conversations: Sequence[Conversation]) -> list[list[int]]:
    """The token ids of whole conversations, each up to the end of its last answer, where its reward is read: nothing
    stands behind it. Raises: DataError as ChatEncoder.encode.
    """
    found = []
    for one in encoder.encode_many(conversations):
        ids = one.input_ids
        last = len(ids) - 1 - ids[::-1].index(encoder.control.end_of_turn)
        found.append(ids[: last + 1])
    return found


@torch.no_grad()
def rewards_of(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """The reward of each sequence, read at its last token, in their order; sequences of similar length are read
    together. `on_progress` hears how many were scored, batch by batch. The model has to be in eval mode.

    Raises: UserError when a reward is not finite.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    found = [0.0] * len(sequences)
    device = model.device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(sequences[chosen[0]])
        ids = torch.full((len(chosen), longest), pad_id)
        mask = torch.zeros((len(chosen), longest), dtype=torch.int64)
        for row, index in enumerate(chosen):
            ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            mask[row, : len(sequences[index])] = 1
        rewards = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[:, 0]
        if not bool(rewards.isfinite().all()):
            raise UserError("a reward is not finite: the model's weights are damaged")
        for index, reward in zip(chosen, rewards.tolist(), strict=True):
            found[index] = reward
        on_progress(len(chosen))
    return found
