"""Our forward pass against transformers' eager one, in float32: logits, every layer's output, losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.families.records import FAMILIES
from tests.parity.amplified import EVERY, TOKENS, masked_labels, ours, reference, relative, token_rows

TOLERANCE = 1e-5


def recorded(model: nn.Module, ids: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """What the embedding, each layer, each attention, each MLP and the final norm give, and the logits, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        model.get_submodule(name).register_forward_hook(hook)

    keep("model.embed_tokens")
    for index in range(len(model.get_submodule("model.layers"))):
        for part in ("", ".self_attn", ".mlp"):
            keep(f"model.layers.{index}{part}")
    keep("model.norm")
    with torch.no_grad():
        outputs["logits"] = model(ids, **inputs).logits
    return outputs


@pytest.mark.parametrize("layers", [3, 4])
@pytest.mark.parametrize("shape", EVERY)
def test_every_layer_and_the_logits_equal_transformers(shape: str, layers: int) -> None:
    ids = token_rows()
    found = recorded(ours(shape, num_hidden_layers=layers), ids)
    expected = recorded(reference(shape, num_hidden_layers=layers), ids)
    assert len(found) == 3 * layers + 3
    off = {name: relative(found[name], expected[name]) for name in expected}
    assert max(off.values()) <= TOLERANCE, off
    assert found["logits"].dtype == torch.float32


def changes(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Every number of a config, changed by itself."""
    family = FAMILIES[config.model_type]
    yield "rms_norm_eps", 0.1
    if family.window_period is not None:
        yield "sliding_window", 9
        yield "query_pre_attn_scalar", config.query_pre_attn_scalar + 1
    if family.attn_softcap:
        yield "attn_logit_softcapping", 30.0
    if family.final_softcap:
        yield "final_logit_softcapping", 29.0
    ropes: dict[str, Any] = config.rope_parameters
    if len(family.ropes) == 1:
        yield "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}
        return
    for layer_type in family.ropes:
        yield "rope_parameters", {**ropes, layer_type: {**ropes[layer_type], "rope_theta": 500.0}}
        yield "rope_parameters", {**ropes, layer_type: {**ropes[layer_type], "rope_type": "linear", "factor": 3.0}}


@pytest.mark.parametrize("shape", EVERY)
def test_the_amplified_model_feels_its_window_and_its_caps(shape: str) -> None:
    """Without this, parity could hold for a model in which nothing numbered in the design matters."""
    ids, plain = token_rows(), ours(shape)
    for key, value in changes(plain.config):
        found = ours(shape, **{key: value})(ids).logits
        assert relative(found, plain(ids).logits) > 100 * TOLERANCE, (key, value)
        assert relative(found, reference(shape, **{key: value})(ids).logits) <= TOLERANCE, (key, value)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", EVERY)
def test_padded_batches_equal_transformers_on_real_tokens(shape: str, side: str) -> None:
    ids = token_rows()
    mask = torch.ones_like(ids)
    mask[0, : 6 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[0, -6:] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = ours(shape)(ids, attention_mask=mask, position_ids=positions).logits
    expected = reference(shape)(ids, attention_mask=mask, position_ids=positions).logits
    assert found.isfinite().all()
    assert relative(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE


@pytest.mark.parametrize("shape", EVERY)
def test_packed_rows_equal_transformers(shape: str) -> None:
    """Positions that restart mark documents in transformers too, when no attention mask is given."""
    ids = token_rows()
    positions = torch.cat([torch.arange(13), torch.arange(TOKENS - 13)]).expand(2, -1)
    expected = reference(shape)(ids, position_ids=positions, use_cache=False).logits
    found = ours(shape)(ids, position_ids=positions).logits
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("items", [None, 7, 1000, torch.tensor(40)])
@pytest.mark.parametrize("shape", EVERY)
def test_the_loss_equals_transformers(shape: str, items: int | Tensor | None, training: bool) -> None:
    ids = token_rows(3)
    labels = masked_labels(ids)
    labels[:, 1::4] = ours(shape)(ids).logits.argmax(dim=-1)[:, 0:-1:4]  # some that it gets right
    found = ours(shape).train(training)(ids, labels=labels, num_items_in_batch=items)
    expected = reference(shape).train(training)(ids, labels=labels, num_items_in_batch=items)
    assert relative(found.loss, expected.loss) <= TOLERANCE
    assert (found.logits is None) == training
    found = ours(shape).train(training)(ids, labels=labels, skip_logits=True)
    assert found.token_count == (labels[:, 1:] != -100).sum()
    guesses = expected.logits[:, :-1].argmax(dim=-1)
    hits = (guesses == labels[:, 1:]).sum()
    assert hits > 0, "a count of zero would prove nothing"
    model = ours(shape).train(training)
    assert model.head_loss(model.model(ids).last_hidden_state, labels).correct_count == hits


@pytest.mark.parametrize("shape", EVERY)
def test_only_the_logits_asked_for_are_given(shape: str) -> None:
    ids, model = token_rows(), ours(shape)
    whole = model(ids).logits
    assert relative(model(ids, logits_to_keep=2).logits, whole[:, -2:]) <= 1e-6
    assert relative(model(ids, logits_to_keep=torch.tensor([3, 20])).logits, whole[:, [3, 20]]) <= 1e-6
    assert model(ids, labels=ids, skip_logits=True).logits is None


@pytest.mark.parametrize("shape", EVERY)
def test_hidden_states_equal_transformers(shape: str) -> None:
    ids = token_rows()
    found = ours(shape)(ids, output_hidden_states=True).hidden_states
    expected = reference(shape)(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    assert all(relative(one, two) <= TOLERANCE for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", EVERY)
def test_embeddings_given_in_place_of_ids_are_not_scaled_again(shape: str) -> None:
    ids, model = token_rows(), ours(shape)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"^pass exactly one of input_ids and inputs_embeds$"):
        model()
