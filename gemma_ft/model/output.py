"""What the native model returns: transformers' output, in its order, or what was counted where no logits were built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from gemma_ft.model.lm_head import HeadLoss

# transformers 5.24 calls `cache` what was `past_key_values` before.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
OWN = ("token_count", "entropy_sum")


@dataclass
class GemmaCausalLMOutput(CausalLMOutputWithPast):
    """transformers' output: loss, logits, cache, hidden_states, as far as there are any, in this order.

    Where a loss was made without logits, also what the fused head counted, by name alone: `token_count` labelled
    tokens, and `entropy_sum`, the entropy in nats of what is predicted for them, summed. With logits there is nothing
    that transformers' output lacks: its Trainer takes all that it does not know for predictions.
    """

    token_count: Tensor | None = None
    entropy_sum: Tensor | None = None

    @classmethod
    def of(
        cls, loss: Tensor | None, logits: Tensor | None, cache: Any, hidden_states: Any, head: HeadLoss | None
    ) -> GemmaCausalLMOutput:
        """`head`: what the loss came from, where there are labels."""
        if head is None or logits is not None:
            return cls(loss, logits, cache, hidden_states)
        return cls(loss, None, cache, hidden_states, None, head.token_count, head.entropy_sum)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values by position that transformers' output has: who asks for logits that were not built gets an
        IndexError, and no count.
        """
        return tuple(value for name, value in self.items() if name not in OWN)
