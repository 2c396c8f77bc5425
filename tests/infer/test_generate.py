"""Greedy answers to many prompts: those of transformers' `generate`, in the order of the prompts, whatever stands
around the model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gemma_ft.infer.generate import Answer, generate_answers
from gemma_ft.model.kv_cache import KVCache
from tests.infer.lively import lively, lively_reference
from tests.parity.amplified import FIRST, SECOND, SHAPES, amplify, token_rows

LENGTHS = (9, 3, 14, 1, 8, 20, 5)
STOPS = [7, 40, 41, 42, 43]
NEW = 16


def prompts() -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(token_rows(len(LENGTHS), 20), LENGTHS, strict=True)]


def answers(model: Any, *, batch_size: int = 3, new: int = NEW) -> list[Answer]:
    return generate_answers(model, prompts(), stop_ids=STOPS, max_new_tokens=new, batch_size=batch_size)


@cache
def by_transformers(shape: str) -> list[Answer]:
    """One prompt at a time through transformers' model and loop."""
    model, found = lively_reference(shape), []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=STOPS,
            pad_token_id=0,
        )
        said = out[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(said) if token in STOPS), None)
        found.append(Answer(said[:end], end is not None))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_equal_those_of_transformers_in_the_order_of_the_prompts(shape: str, batch_size: int) -> None:
    expected = by_transformers(shape)
    assert answers(lively(shape), batch_size=batch_size) == expected
    if shape == SECOND:
        assert {answer.stopped for answer in expected} == {True, False}


def test_no_prompts_no_answers() -> None:
    assert generate_answers(lively(FIRST), [], stop_ids=STOPS, max_new_tokens=4, batch_size=2) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training: bool) -> None:
    model = lively(SECOND, attention_dropout=0.9).train(training)
    assert answers(model) == answers(lively(SECOND)), "dropout is off meanwhile"
    assert model.training == training
    with pytest.raises(ValueError, match=r"^prompt: empty; it needs at least one token$"):
        generate_answers(model, [[5], []], stop_ids=STOPS, max_new_tokens=4, batch_size=2)
    assert model.training == training


def test_gradients_flow_as_before_after_answering_in_between() -> None:
    model, ids = lively(SECOND).train(), token_rows()
    model(ids, labels=ids).loss.backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    answers(model)
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(weight.grad, before[name]) for name, weight in model.named_parameters())


def test_a_model_under_peft_answers_with_its_adapter_on_or_off() -> None:
    model = lively(SECOND)
    plain = answers(model)
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    assert answers(wrapped) == plain, "a fresh adapter changes nothing"
    amplify_adapter(wrapped)
    tuned = answers(wrapped)
    assert tuned != plain
    with wrapped.disable_adapter():
        assert answers(wrapped) == plain
    assert answers(wrapped.merge_and_unload()) == tuned


def amplify_adapter(model: Any) -> None:
    adapter = torch.nn.ParameterDict(
        {name.replace(".", "_"): weight for name, weight in model.named_parameters() if "lora_" in name}
    )
    amplify(adapter)


def test_float32_weights_under_bf16_autocast_answer_as_bf16_weights_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a full fine-tuning in bf16 is asked in between: its cache is in bf16 too. They round at different places, and
    are as near to float32.
    """
    dtypes: set[torch.dtype] = set()
    model = lively(SECOND)
    truth = states(model)
    layer = model.model.layers[0].self_attn
    monkeypatch.setattr(layer, "forward", watched(layer.forward, dtypes))
    with torch.autocast("cpu", torch.bfloat16):
        assert len(answers(model, new=3)) == len(LENGTHS)
        found = states(model)
    assert dtypes == {torch.bfloat16}
    apart, apart_narrow = (
        float((one - truth).norm() / truth.norm()) for one in (found, states(lively(SECOND, dtype=torch.bfloat16)))
    )
    assert 1e-4 < apart < 1.5 * apart_narrow < 0.1


@torch.no_grad()
def states(model: Any) -> Tensor:
    """Final hidden states of one prompt and of the tokens after it, taken one by one, in float32."""
    cache = KVCache(model.model.numerics.window_tokens, slots=1, max_seq_len=32)
    found = []
    for piece in (prompts()[0], *([token] for token in prompts()[5])):
        one = cache.open(0, [len(piece)], torch.device("cpu"))
        found.append(model.model(torch.tensor([piece]), past_key_values=one).last_hidden_state.float())
        one.finish()
    return torch.cat(found, dim=1)


def watched(forward: Any, dtypes: set[torch.dtype]) -> Any:
    def call(x: Any, angles: Any, visible: Any, cache: Any) -> Any:
        out = forward(x, angles, visible, cache)
        dtypes.update(part.dtype for part in cache.cache.rings[0].parts)
        return out

    return call


def test_a_sequence_longer_than_the_model_was_made_for_is_answered_all_the_same() -> None:
    model = lively(SECOND, max_position_embeddings=12)
    assert answers(model) == answers(lively(SECOND))
