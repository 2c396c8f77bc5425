"""How the next token is chosen from the logits: greedily, or drawn by a request's own generator.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_ft.errors import UserError

# field: least and greatest value. Zero turns temperature, top_k and min_p off, one turns top_p and the penalty off.
RANGES = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "seed": (0, 2**63 - 1),
}
WHOLE = ("top_k", "seed")
GREEDY_BELOW = 1e-6  # a temperature under it is 0: float32 logits divided by less overflow, and nothing else is drawn


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens. Temperature 0 (anything below GREEDY_BELOW) is greedy: the most likely token,
    whatever else is set but the repetition penalty.

    The order is transformers': repetition_penalty over prompt and answer (logits > 0 are divided by it, others
    multiplied; arXiv:1909.05858 section 4.1), temperature, top_k, top_p (arXiv:1904.09751), min_p (arXiv:2407.01082).
    `seed` None: another draw each time.
    Raises: UserError naming the field and its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (least, greatest) in RANGES.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            kinds = (int,) if name in WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= greatest:
                what = "a whole number from " if name in WHOLE else ""
                raise UserError(f"{name}: expected {what}{least} to {greatest}, got {value!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW


class Sampler:
    """Chooses the tokens of one request, one after the other.

    The generator lies on the CPU and is the request's own, so that its draws do not depend on device or neighbours.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], max_new_tokens: int, device: torch.device
    ) -> None:
        self.greedy = sampling.greedy
        self.processors = _processors(sampling)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._previous_ids: Tensor | None = None  # [1, prompt + max_new_tokens] ids for the penalty, kept on the device
        self._length = len(prompt_ids)
        if sampling.repetition_penalty != 1:
            self._previous_ids = torch.zeros(1, self._length + max_new_tokens, dtype=torch.long, device=device)
            self._previous_ids[0, : self._length] = torch.tensor(list(prompt_ids))

    def scores(self, logits: Tensor) -> Tensor:
        """Logits [1, V] -> the scores [1, V] that are drawn from; what may not be drawn is -inf."""
        previous_ids = self._previous_ids[:, : self._length] if self._previous_ids is not None else None
        return self.processors(previous_ids, logits)

    def uniform(self) -> float:
        """The next draw in [0, 1); greedy requests draw nothing."""
        return 0.0 if self.greedy else float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def append(self, token_id: int) -> None:
        """Count a chosen token to what was said."""
        if self._previous_ids is not None and self._length < self._previous_ids.shape[1]:
            self._previous_ids[0, self._length] = token_id
            self._length += 1


def next_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The next token of each row: logits [B, V] in float32 or wider -> ids [B] on their device; -1 where the logits,
    or the weights that would be drawn from, are not finite.
    """
    best, tokens = logits.max(dim=-1)
    own = [row for row, sampler in enumerate(samplers) if sampler.processors]
    if own:
        draws = torch.tensor([samplers[row].uniform() for row in own], dtype=torch.float64).to(logits.device)
        for draw, row in zip(draws, own, strict=True):
            scores = samplers[row].scores(logits[row : row + 1])
            tokens[row] = scores.argmax() if samplers[row].greedy else _drawn(scores[0], draw)
    return tokens.where(best.isfinite(), -1)


def _drawn(scores: Tensor, draw: Tensor) -> Tensor:
    """The token [] at which the distribution function of softmax(scores [V]) passes `draw` in [0, 1); -1 where the
    weights are not finite.
    """
    heights = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    token = torch.searchsorted(heights, draw * heights[-1], right=True).clamp(max=len(scores) - 1)
    return token.where(heights[-1].isfinite(), -1)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own processors, in its order; a plain draw is a temperature of 1."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.greedy:
        return chain
    chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(float(sampling.min_p)))
    return chain
