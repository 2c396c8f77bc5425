"""Laws in float64: a padded or packed row computes what its sequences compute alone, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import ONE_OF_EACH, SECOND, SOME, gradients, ours, relative, token_rows

LENGTHS = (5, 12, 4)  # the second is longer than the window
TOLERANCE = 1e-10


def documents(seed: int = 0) -> list[Tensor]:
    return [token_rows(1, length, seed + length) for length in LENGTHS]


def packed(parts: list[Tensor], pad: int = 0) -> dict[str, Tensor]:
    """One row of all parts: ids, positions from 0 in each, document ids, no label on first tokens; `pad` at its end."""
    ids = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    numbers = torch.cat([torch.full((part.shape[1],), index) for index, part in enumerate(parts)])[None]
    row = {"input_ids": ids, "position_ids": positions, "document_ids": numbers}
    row["labels"] = ids.where(positions > 0, torch.tensor(-100))
    row["attention_mask"] = torch.ones_like(ids)
    fill = {"input_ids": 0, "position_ids": 0, "document_ids": -1, "labels": -100, "attention_mask": 0}
    return {name: torch.nn.functional.pad(value, (0, pad), value=fill[name]) for name, value in row.items()}


def alone(model: GemmaForCausalLM, parts: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of the parts one after the other, their loss sum and its gradients, each part computed alone."""
    model.zero_grad()
    logits = torch.cat([model.eval()(part).logits for part in parts], dim=1)
    losses = [model.train()(part, labels=part, num_items_in_batch=1).loss for part in parts]
    torch.stack(losses).sum().backward()
    return (
        logits.detach(),
        torch.stack(losses).sum().detach(),
        {name: g.clone() for name, g in gradients(model).items()},
    )


@pytest.mark.parametrize("how", ["document_ids", "position_ids"])
@pytest.mark.parametrize("shape", SOME)
def test_a_packed_row_equals_its_documents_alone(shape: str, how: str) -> None:
    model, parts = ours(shape, dtype=torch.float64), documents()
    logits, loss, grads = alone(model, parts)
    row = packed(parts)
    for name in {"document_ids": ["attention_mask"], "position_ids": ["attention_mask", "document_ids"]}[how]:
        row.pop(name)
    labels = row.pop("labels")
    assert relative(model.eval()(**row).logits, logits) <= TOLERANCE
    model.zero_grad()
    found = model.train()(**row, labels=labels, num_items_in_batch=1).loss
    found.backward()
    assert relative(found, loss) <= TOLERANCE
    assert all(relative(grad, grads[name]) <= TOLERANCE for name, grad in gradients(model).items())


@pytest.mark.parametrize("shape", SOME)
def test_a_collated_batch_of_packed_rows_equals_its_documents_alone(shape: str) -> None:
    """As the collator gives it: mask, positions and documents together, rows of unequal lengths padded on the right."""
    model, first, second = ours(shape, dtype=torch.float64), documents(), documents(50)[:2]
    _, loss, grads = alone(model, first + second)
    rows = packed(first), packed(second, pad=LENGTHS[2])
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    model.zero_grad()
    output = model.train()(**batch, num_items_in_batch=1)
    output.loss.backward()
    assert output.token_count == sum(part.shape[1] - 1 for part in first + second)
    assert relative(output.loss, loss) <= TOLERANCE
    assert all(relative(grad, grads[name]) <= TOLERANCE for name, grad in gradients(model).items())


@pytest.mark.parametrize("given_positions", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SOME)
def test_padding_changes_no_real_token(shape: str, side: str, given_positions: bool) -> None:
    model, parts = ours(shape, dtype=torch.float64), documents()
    logits, loss, grads = alone(model, parts)
    longest = max(LENGTHS) + 2  # every row is padded
    sides = [((longest - n, 0) if side == "left" else (0, longest - n)) for n in LENGTHS]
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(part, to) for part, to in zip(parts, sides, strict=True)])
    mask = torch.cat([pad(torch.ones_like(part), to) for part, to in zip(parts, sides, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if given_positions:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = model.eval()(**inputs).logits
    assert found.isfinite().all()
    assert relative(found[mask.bool()], logits[0]) <= TOLERANCE
    labels = ids.where(mask.bool(), torch.tensor(-100))
    first_real = torch.arange(len(LENGTHS)), mask.argmax(dim=1)
    labels[first_real] = -100  # else the last pad token would be asked for it
    model.zero_grad()
    output = model.train()(**inputs, labels=labels, num_items_in_batch=1)
    output.loss.backward()
    assert relative(output.loss, loss) <= TOLERANCE
    assert all(relative(grad, grads[name]) <= TOLERANCE for name, grad in gradients(model).items())


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_fault_12_rows_without_any_visible_key_stay_finite(shape: str) -> None:
    ids = token_rows()
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1] = 0, 0  # more padding than the window is wide; a row of nothing but padding
    labels = ids.where(mask.bool(), torch.tensor(-100))
    for dtype in (torch.float32, torch.bfloat16):
        model = ours(shape, dtype=dtype).train()
        output = model(ids, attention_mask=mask, labels=labels, skip_logits=False)
        output.loss.backward()
        assert output.logits.isfinite().all()
        assert output.loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_fault_28_packing_leaks_nothing_between_documents(shape: str) -> None:
    model, parts = ours(shape, dtype=torch.float64), documents()
    row = packed(parts)
    labels = row.pop("labels")
    last = slice(sum(LENGTHS[:2]), None)
    before = model(**row).logits[:, last]
    row["input_ids"][:, : LENGTHS[0]] = 50  # another first document
    assert torch.equal(model(**row).logits[:, last], before)
    shifted = {**row, "position_ids": torch.arange(sum(LENGTHS))[None]}
    same = model(**{**row, "document_ids": torch.zeros_like(row["document_ids"])}).logits[:, last]
    assert relative(same, before) > 1e-3, "one document for all would be seen"
    assert relative(model(**shifted).logits[:, last], before) <= TOLERANCE, "only distances matter inside a document"
    embedded = model.get_input_embeddings()(row.pop("input_ids")).detach().requires_grad_()
    only_last = labels.clone()
    only_last[:, : last.start] = -100
    model.train()(inputs_embeds=embedded, labels=only_last, **row).loss.backward()
    assert not embedded.grad[:, : last.start].any()
    assert embedded.grad[:, last].any()


def test_misuse_of_masks_is_refused() -> None:
    model, ids = ours(SECOND), token_rows()
    with pytest.raises(
        ValueError, match=r"^attention_mask: expected ones and zeros, \[batch, tokens\], got shape \(2, 1, 21, 21\); "
    ):
        model(ids, attention_mask=torch.ones(2, 1, 21, 21))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"^document_ids cannot be combined with a filled cache$"):
        model(ids[:, :1], past_key_values=cache, document_ids=torch.zeros(2, 1))
