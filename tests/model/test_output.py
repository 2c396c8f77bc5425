"""What a forward pass returns, against transformers 5.24's Gemma: the same things by name and by position, and a clear
refusal of what is not given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Categorical
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from gemma_ft.errors import UserError
from gemma_ft.model.output import OWN
from tests.parity.amplified import FIRST, SECOND, TOKENS, VOCAB, ours, reference, relative, token_rows

TOLERANCE = 1e-5
FAMILIES = [FIRST, SECOND]


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": True}, {"use_cache": False}, {"labels": True, "use_cache": False, "output_hidden_states": True},
     {"output_hidden_states": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", FAMILIES)
def test_the_output_is_that_of_transformers_by_name_and_by_position(shape: str, options: dict[str, Any]) -> None:
    ids = token_rows()
    wanted = {**options, "labels": ids} if "labels" in options else dict(options)
    # transformers 5.24 keeps no cache where it is not asked for one by name
    wanted.setdefault("use_cache", True)
    found, expected = (made(shape)(ids, **wanted) for made in (ours, reference))
    assert list(found.keys()) == list(expected.keys())
    assert [type(value) for value in found.to_tuple()] == [type(value) for value in expected.to_tuple()]
    tensors = [number for number, value in enumerate(expected.to_tuple()) if isinstance(value, torch.Tensor)]
    assert all(relative(found[number], expected[number]) <= TOLERANCE for number in tensors)
    plain = ours(shape)(ids, **wanted, return_dict=False)
    assert type(plain) is tuple
    assert len(plain) == len(expected)
    assert all(torch.equal(plain[number], found[number]) for number in tensors)


def test_the_first_of_an_output_is_the_loss_and_the_second_the_logits() -> None:
    ids, model = token_rows(), ours(SECOND)
    assert model(ids)[0].shape == (2, TOKENS, VOCAB)
    loss, logits = model(ids, labels=ids)[:2]
    assert loss.shape == ()
    assert logits.shape == (2, TOKENS, VOCAB)
    model.config.return_dict = False
    assert model(ids)[0].shape == (2, TOKENS, VOCAB)


@pytest.mark.parametrize("options", [{}, {"return_dict": False}], ids=str)
def test_a_loss_without_logits_has_none_at_their_place(options: dict[str, Any]) -> None:
    """In training no logits are built: what was counted instead has a name, and no position that logits have."""
    ids, model = token_rows(), ours(SECOND).train()
    found = model(ids, labels=ids, **options)
    assert found[0].requires_grad
    assert len(found[:2]) == 1
    with pytest.raises(IndexError):
        found[1]


@pytest.mark.parametrize("training", [True, False])
def test_what_the_head_counted_is_given_where_no_logits_are(training: bool) -> None:
    ids, model = token_rows(), ours(SECOND).train(training)
    found = model(ids, labels=ids, skip_logits=True, use_cache=False)
    assert list(found.keys()) == ["loss", "token_count", "entropy_sum"]
    assert found.token_count == 2 * (TOKENS - 1)
    logits = model(ids, skip_logits=False).logits[:, :-1]
    torch.testing.assert_close(found.entropy_sum, Categorical(logits=logits).entropy().sum(), rtol=1e-6, atol=1e-5)
    assert set(OWN).isdisjoint(model(ids, labels=ids, skip_logits=False))


class Rows(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = token_rows(3)[index]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("preprocess", [None, lambda logits, labels: logits.argmax(dim=-1)], ids=["whole", "argmax"])
def test_the_trainer_of_transformers_measures_logits(preprocess: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def measure(found: EvalPrediction) -> dict[str, float]:
        seen.append(found.predictions)
        return {}

    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(ours(SECOND), arguments, compute_metrics=measure, preprocess_logits_for_metrics=preprocess)
    trainer.evaluate(Rows())
    (predictions,) = seen
    expected = ours(SECOND)(token_rows(3)).logits
    if preprocess is not None:
        assert torch.equal(torch.as_tensor(predictions), expected.argmax(dim=-1))
    else:
        assert relative(torch.as_tensor(predictions), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_both_of_its_names(name: str) -> None:
    """transformers 5.24 renamed past_key_values; what goes by the other name must not be dropped."""
    ids, model = token_rows(), ours(SECOND, dtype=torch.float64)
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :13], use_cache=True, **{name: cache})
    assert getattr(first, name) is cache
    second = model(ids[:, 13:], use_cache=True, **{name: cache}).logits
    assert relative(second, model(ids).logits[:, 13:]) <= 1e-10
    assert relative(model.model(ids[:, :2], **{name: None}).last_hidden_state, model.model(ids[:, :2])[0]) <= 1e-10


def test_attention_weights_are_refused_in_one_line() -> None:
    line = (
        "output_attentions: attention weights are not kept here; transformers' own class gives them, from the same "
        "folder and with attn_implementation='eager'"
    )
    ids, model = token_rows(), ours(SECOND)

    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as error:
            model(ids, **options)
        return str(error.value)

    assert refused(output_attentions=True) == line
    with pytest.raises(UserError) as error:
        model.generate(ids, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)
    assert str(error.value) == line
    assert model(ids, output_attentions=False).attentions is None
    assert model(ids, output_attentions=None).attentions is None
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert refused() == line


def test_hidden_states_are_given_where_the_config_asks_for_them() -> None:
    ids, model, stock = token_rows(), ours(SECOND), reference(SECOND)
    model.config.output_hidden_states = stock.config.output_hidden_states = True
    found, expected = model(ids).hidden_states, stock(ids).hidden_states
    assert len(found) == len(expected)
    assert all(relative(one, two) <= TOLERANCE for one, two in zip(found, expected, strict=True))
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize(
    ("mask", "found"),
    [(torch.ones(2, 1, TOKENS, TOKENS), f"shape (2, 1, {TOKENS}, {TOKENS})"),
     (torch.ones(TOKENS), f"shape ({TOKENS},)"),
     ({"full_attention": None, "sliding_attention": None}, "a dict")],
    ids=["4-D", "1-D", "by kind of layer"],
)  # fmt: skip
def test_masks_of_other_forms_are_refused_in_one_line(mask: Any, found: str) -> None:
    with pytest.raises(UserError) as error:
        ours(SECOND)(token_rows(), attention_mask=mask)
    assert str(error.value) == (
        f"attention_mask: expected ones and zeros, [batch, tokens], got {found}; packed documents are told apart by "
        "document_ids, or by position_ids that restart"
    )
