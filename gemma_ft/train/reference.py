"""The model that a policy's answers are compared with: the policy's own base, the adapter that it started from, or
log-probabilities that were computed before training. Never a second base in memory.

Letters: B sequences of a micro-batch, T tokens, A answers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gemma_ft.adapters.lora import adapter_off, reference_on
from gemma_ft.data.pack.collate_preferences import DISTINCT
from gemma_ft.recipe.objectives import LIVE
from gemma_ft.train.objectives.answers import summed_logprobs
from gemma_ft.train.sampler import Batch

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids", "labels")  # the rest is the objective's


@dataclass(frozen=True)
class Reference:
    """`kind`: as recipe.objectives.reference_kind names it; of none, and where batches bring their log-probabilities,
    nothing is computed here. `mismatched`: what was computed before of KTO's mismatched answers, by step: float64 [A].
    """

    kind: str = "none"
    mismatched: dict[int, Any] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """Whether it is the policy's own model in another state."""
        return self.kind in LIVE

    def logprobs(self, model: Any, inputs: Batch) -> Tensor:
        """Summed log-probabilities of the answers of a batch [A], in float64. `model`: the policy, as it is wrapped."""
        assert self.live, "the batch has none, and there is no model to ask"
        with self._on(unwrapped(model)):
            return answer_logprobs(model, inputs)

    def _on(self, model: Any) -> contextlib.AbstractContextManager[None]:
        return adapter_off(model) if self.kind == "adapter_off" else reference_on(model)


@torch.no_grad()
def answer_logprobs(model: Any, inputs: Batch) -> Tensor:
    """Summed log-probabilities of the answers of a batch [A], in float64, by the passes that training makes, in its
    mode: for equal weights they are those of the policy to the bit.
    """
    return summed_logprobs(token_logprobs(model, inputs), inputs)


@torch.no_grad()
def token_logprobs(model: Any, inputs: Batch) -> Tensor:
    """log p of each label given the tokens before it, [B, T], of a model in its mode."""
    found: list[Tensor] = []

    def keep(logprobs: Tensor) -> Tensor:
        found.append(logprobs)
        return torch.zeros_like(logprobs)

    model(**{**known_to_model(inputs), "loss_weights": keep}, use_cache=False, skip_logits=True)
    return found[0]


def known_to_model(inputs: Batch) -> Batch:
    """What of a batch the model is given."""
    told = [name for name in DISTINCT if name in inputs]
    return {name: inputs[name] for name in (*MODEL_INPUTS, *told)}


def unwrapped(model: Any) -> Any:
    """A model without what DDP puts around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model
