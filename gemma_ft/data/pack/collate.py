"""Examples -> one batch of tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from gemma_ft.system.limits import IGNORE

PADDING = -1  # the document id of what is no document


class Collator:
    """A list of examples -> int64 tensors (B, T), padded at the right to the longest of them, and on to a multiple of
    `multiple`.

    input_ids (pad: the pad id), labels (-100), attention_mask (1 real, 0 pad), position_ids (0), document_ids (-1).
    Where examples have them, also loss_weights, float32 (0).
    """

    def __init__(self, pad_id: int, *, multiple: int = 1) -> None:
        self.multiple = multiple
        self.padding = {"input_ids": pad_id, "labels": IGNORE, "position_ids": 0, "document_ids": PADDING}

    def __call__(self, examples: Sequence[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        """The batch. The examples are not changed."""
        lengths = [len(example["input_ids"]) for example in examples]
        longest = -(-max(lengths) // self.multiple) * self.multiple
        batch = {
            name: torch.tensor([example[name] + [pad] * (longest - len(example[name])) for example in examples])
            for name, pad in self.padding.items()
        }
        if any("loss_weights" in example for example in examples):
            weights = [example.get("loss_weights", []) for example in examples]  # a blank row has none
            batch["loss_weights"] = torch.tensor([one + [0.0] * (longest - len(one)) for one in weights])
        batch["attention_mask"] = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
        return batch
