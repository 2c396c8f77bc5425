"""Laws in float64: what several sequences begin with, computed once, gives what each computes by itself, forward and
backward; wherever they lie, and whether or not layers compute their activations again.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.data.pack.collate_preferences import DISTINCT, PreferenceCollator
from gemma_ft.model.shared_tokens import SharedTokens
from tests.parity.amplified import ONE_OF_EACH, SECOND, VOCAB, gradients, ours, relative

TOLERANCE = 1e-10
PROMPT = 11  # longer than the window
PLAIN = ("input_ids", "attention_mask", "position_ids", "document_ids", "labels")


def rows(*answers: tuple[int, int, int], seed: int = 0) -> list[dict[str, list[Any]]]:
    """Pairs: tokens of a prompt, of its chosen answer and of the rejected one."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for prompt, *sizes in answers:
        asked = torch.randint(4, VOCAB, (prompt,), generator=draw).tolist()
        row: dict[str, list[Any]] = {"sides": [1, 0], "row_weights": [1.0], "margins": [0.0]}
        for document, size in enumerate(sizes):
            said = torch.randint(4, VOCAB, (size,), generator=draw).tolist()
            more = {"input_ids": asked + said, "labels": [-100] * prompt + said}
            more |= {"position_ids": list(range(prompt + size)), "document_ids": [document] * (prompt + size)}
            row = {**row, **{name: row.get(name, []) + values for name, values in more.items()}}
        found.append(row)
    return found


PAIRS = rows((PROMPT, 9, 4), (3, 2, 12), (1, 5, 5))
DISTINCT_TOKENS = sum(
    prompt + chosen + rejected for prompt, chosen, rejected in ((PROMPT, 9, 4), (3, 2, 12), (1, 5, 5))
)


def result(model: Any, batch: dict[str, Tensor], *names: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss sum and its gradients of a batch, every label with a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, batch["labels"].numel(), dtype=torch.float64).view(batch["labels"].shape)
    inputs = {name: batch[name] for name in (*PLAIN, *names)}
    loss = model.train()(**inputs, loss_weights=weights, num_items_in_batch=1, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(model).items()}


@pytest.mark.parametrize("budget", [None, 24, 100], ids=["apart", "packed", "in one row"])
@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_a_prompt_computed_once_is_one_computed_for_each_answer(shape: str, budget: int | None) -> None:
    model, batch = ours(shape, dtype=torch.float64), PreferenceCollator(0, budget=budget)(PAIRS)
    assert len(batch[DISTINCT[1]]) == DISTINCT_TOKENS < int(batch["attention_mask"].sum())
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, grads = result(model, batch)
        found, shared = result(model, batch, *DISTINCT)
        assert relative(found, loss) <= TOLERANCE
        assert shared.keys() == grads.keys()
        assert all(relative(shared[name], grad) <= TOLERANCE for name, grad in grads.items())


@pytest.mark.parametrize("attention", ["eager", "blockwise"])
def test_states_have_the_places_of_the_batch(attention: str) -> None:
    model, batch = ours(SECOND, dtype=torch.float64), PreferenceCollator(0)(PAIRS)
    model.set_attn_implementation(attention)
    labels, real = batch.pop("labels"), batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in PLAIN if name != "labels"}
    wanted = model.eval()(**inputs, use_cache=False).logits
    found = model(**inputs, **{name: batch[name] for name in DISTINCT}, use_cache=False).logits
    assert found.shape == (*labels.shape, VOCAB)
    assert relative(found[real], wanted[real]) <= TOLERANCE


def test_what_is_not_distinct_is_not_computed() -> None:
    """The layers see as many tokens as there are distinct ones, and the head's products as many labels as before."""
    model, batch = ours(SECOND, dtype=torch.float64), PreferenceCollator(0)(PAIRS)
    seen: list[tuple[int, ...]] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    result(model, batch, *DISTINCT)
    assert seen == [(1, DISTINCT_TOKENS)]


def test_gradients_of_both_places_are_summed() -> None:
    shared = SharedTokens(torch.tensor([[0, 1, 2], [0, 1, 3]]), torch.tensor([0, 1, 2, 5]), torch.tensor([3, 4]))
    given = torch.randn(1, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(shared.spread, given)
    assert torch.autograd.gradcheck(shared.distinct, torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_())
    assert torch.equal(shared.distinct(shared.spread(given)), given)
    assert torch.equal(shared.distinct(torch.tensor([[5, 6, 7], [5, 6, 8]])), torch.tensor([[5, 6, 7, 8]]))
