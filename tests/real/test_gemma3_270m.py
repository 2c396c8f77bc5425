"""The real Gemma 3 270M: our model is transformers' eager one, layer by layer and past its window, and finds in text
what was measured when its numerics were written down.

Perplexity sees neither a window that is off by one nor the rounding of the embedding scale: hidden states do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import gemma_ft
from gemma_ft.system.limits import IGNORE
from tests.parity.amplified import relative
from tests.real.long_texts import SENTENCES, long_texts

TOKENS = 1100  # more than two windows, one BOS included
CHUNK = 128  # positions whose logits are held at once: a row of them has 262,144 numbers
EVERY = 10  # each position's hidden states are compared, every tenth's logits
TOLERANCE = 1e-5
# Nats per token of float32 on the widened weights: of all, of what is predicted within the window, of the rest.
NLL = {"licence": (2.1613, 2.3192, 2.0240), "tinyshakespeare": (3.7611, None, None)}
OF_SENTENCES = {1: 2.4869, 0: 5.8427, 2: 3.3536}  # by the number of BOS
BF16_SLACK = 1.05  # of root mean square error: 0.9 was seen
TEXTS = long_texts()


@pytest.fixture(scope="module")
def ours(gemma3_270m: Path) -> Any:
    return gemma_ft.load_model(gemma3_270m, dtype=torch.float32)


@pytest.fixture(scope="module")
def stock(gemma3_270m: Path) -> Any:
    return stock_model(gemma3_270m, torch.float32)


@pytest.fixture(scope="module")
def tokenizer(gemma3_270m: Path) -> Any:
    return gemma_ft.load_tokenizer(gemma3_270m)


def stock_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own class, loaded in this dtype: one that is cast has other RoPE frequencies."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def ids_of(tokenizer: Any, name: str) -> Tensor:
    """The first tokens [1, T] of a text."""
    ids = tokenizer(TEXTS[name]).input_ids[:TOKENS]
    assert len(ids) == TOKENS
    assert ids.count(tokenizer.bos_token_id) == 1
    return torch.tensor([ids])


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Nats [T - 1] of each token after the first."""
    states = model.model(ids, use_cache=False).last_hidden_state[0, :-1]
    targets = ids[0, 1:]
    parts = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([cross_entropy(model.lm_head(part).float(), said, reduction="none") for part, said in parts])


@torch.no_grad()
def states_and_logits(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the embedding and each layer give, the last one behind the final norm, and logits of some positions."""
    out = model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=torch.arange(0, ids.shape[1], EVERY))
    return {**{f"state {number}": one for number, one in enumerate(out.hidden_states)}, "logits": out.logits}


@pytest.mark.parametrize("name", TEXTS)
def test_every_layer_and_the_logits_equal_transformers(name: str, ours: Any, stock: Any, tokenizer: Any) -> None:
    ids = ids_of(tokenizer, name)
    assert ours.config.sliding_window * 2 < TOKENS
    found, expected = states_and_logits(ours, ids), states_and_logits(stock, ids)
    assert found.keys() == expected.keys()
    assert len(found) == ours.config.num_hidden_layers + 2
    off = {part: relative(found[part], expected[part]) for part in expected}
    assert max(off.values()) <= TOLERANCE, {part: one for part, one in off.items() if one > TOLERANCE}
    assert torch.equal(found["logits"].argmax(-1), expected["logits"].argmax(-1))


@pytest.mark.parametrize("name", TEXTS)
def test_the_loss_of_a_text_is_the_measured_one_past_the_window_too(name: str, ours: Any, tokenizer: Any) -> None:
    ids, window = ids_of(tokenizer, name), ours.config.sliding_window
    found = losses(ours, ids)
    means = (found.mean(), found[: window - 1].mean(), found[window - 1 :].mean())
    for mean, measured in zip(means, NLL[name], strict=True):
        assert measured is None or float(mean) == pytest.approx(measured, abs=2e-4)
    labels = ids.clone()
    labels[:, :window] = IGNORE
    with torch.no_grad():  # by the head that training has, which never holds the logits of a sequence
        assert float(ours(ids, labels=labels, skip_logits=True).loss) == pytest.approx(float(means[2]), rel=1e-5)


def test_each_attention_gives_the_same_loss_at_every_position(ours: Any, tokenizer: Any) -> None:
    ids, chosen = ids_of(tokenizer, "licence"), ours.config._attn_implementation
    found = {}
    try:
        for name in ("eager", "sdpa", "blockwise"):
            ours.set_attn_implementation(name)
            assert ours.config._attn_implementation == name
            found[name] = losses(ours, ids)
    finally:
        ours.set_attn_implementation(chosen)
    for name in ("sdpa", "blockwise"):
        assert float((found[name] - found["eager"]).abs().max()) <= 1e-3, name
        assert relative(found[name], found["eager"]) <= 5 * TOLERANCE, name


def test_a_text_wants_one_bos(ours: Any, tokenizer: Any) -> None:
    ids = tokenizer(SENTENCES).input_ids
    for count, measured in OF_SENTENCES.items():
        given = torch.tensor([[tokenizer.bos_token_id] * count + ids[1:]])
        assert float(losses(ours, given).mean()) == pytest.approx(measured, abs=2e-4), count


def test_bf16_is_within_transformers_own_rounding(gemma3_270m: Path, tokenizer: Any) -> None:
    """Against float32 with the same rounded weights, from the same embeddings (sqrt(D) is rounded, and no error)."""
    ids = ids_of(tokenizer, "licence")[:, :600]
    rounded = stock_model(gemma3_270m, torch.bfloat16)
    mine = gemma_ft.load_model(gemma3_270m, dtype=torch.bfloat16)
    embedded = rounded.get_input_embeddings()(ids).detach()
    assert torch.equal(mine.get_input_embeddings()(ids), embedded)
    keep = torch.arange(0, ids.shape[1], EVERY)
    with torch.no_grad():
        found, theirs = (one(ids, use_cache=False, logits_to_keep=keep).logits.float() for one in (mine, rounded))
        del mine
        truth = rounded.float()(inputs_embeds=embedded.float(), use_cache=False, logits_to_keep=keep).logits
    error, allowed = (float((one - truth).pow(2).mean().sqrt()) for one in (found, theirs))
    assert 0 < error <= BF16_SLACK * allowed, (error, allowed)
