"""The held-out loss: each token counted once, windows against chunks and the whole text, rows against the batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_ft.adapters.lora import adapter_off
from gemma_ft.data.conversation import Conversation, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.pack.arrange import prepare
from gemma_ft.data.pack.collate import Collator
from gemma_ft.data.pack.text_windows import windows
from gemma_ft.errors import DataError, UserError
from gemma_ft.evaluate.held_out import held_out_loss
from gemma_ft.evaluate.perplexity import Piece, check_window, loss_rows, piece_losses, pieces_of
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.system.limits import IGNORE
from gemma_ft.system.shipped import shipped_root
from tests.export.tuned import wrap
from tests.parity.amplified import VOCAB, ours

TEXT = "The garden club meets on Sunday.\nBring seeds, gloves and tea.\n" * 6


def done(count: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(load_tokenizer(str(shipped_root() / "data" / "gemma-tiny")))


@pytest.fixture(scope="module")
def model() -> GemmaForCausalLM:
    """Amplified, in float64, with the vocabulary of the tiny tokenizer."""
    return ours("gemma-2-2b", dtype=torch.float64, vocab_size=2048)


@given(tokens=st.integers(0, 200), size=st.integers(1, 60), data=st.data())
def test_every_token_is_new_in_exactly_one_window(tokens: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    found = windows(tokens, size=size, stride=stride)
    new = [place for one in found for place in range(one.new, one.end)]
    assert new == list(range(tokens))
    for number, one in enumerate(found):
        assert one.end - one.start <= size
        if number and not (stride == size and one is found[-1]):
            assert one.new - one.start >= size - stride


@given(tokens=st.integers(1, 200), size=st.integers(2, 60))
def test_a_stride_of_the_window_gives_chunks_without_a_lonely_end(tokens: int, size: int) -> None:
    found = windows(tokens, size=size, stride=size)
    assert all(one.start == one.new for one in found)
    assert len(found) == math.ceil(tokens / size)
    assert tokens == 1 or min(one.end - one.start for one in found) > (0 if size == 2 else 1)


def test_every_window_begins_with_one_bos_and_counts_each_token_once(encoder: ChatEncoder) -> None:
    found = pieces_of([PlainText("a", TEXT)], encoder, max_seq_len=32, window=32, stride=10)
    whole = encoder.encode_documents([PlainText("a", TEXT)])[0].input_ids
    counted = [label for piece in found.pieces for label in piece.labels if label != IGNORE]
    assert counted == whole[1:]
    for piece in found.pieces:
        assert len(piece.input_ids) == len(piece.labels) <= 32
        assert piece.input_ids[0] == encoder.control.bos
        assert piece.input_ids.count(encoder.control.bos) == 1
        pairs = zip(piece.input_ids, piece.labels, strict=True)
        assert all(label in (IGNORE, token) for token, label in pairs)


def scored(model: GemmaForCausalLM, encoder: ChatEncoder, text: str, window: int, stride: int) -> tuple[float, float]:
    pieces = pieces_of([PlainText("a", text)], encoder, max_seq_len=window, window=window, stride=stride).pieces
    losses = piece_losses(model, pieces, pad_id=encoder.control.pad, batch_size=3, on_progress=done)
    return tuple(losses.sum(axis=0))


def test_one_window_over_all_is_the_plain_loss(model: GemmaForCausalLM, encoder: ChatEncoder) -> None:
    ids = torch.tensor([encoder.encode_documents([PlainText("a", TEXT)])[0].input_ids])
    logits = model(ids).logits[0, :-1]
    plain = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    total, count = scored(model, encoder, TEXT, window=ids.shape[1], stride=5)
    assert count == ids.shape[1] - 1
    assert total == pytest.approx(plain.item(), rel=1e-10)


def test_a_stride_without_overlap_is_the_loss_of_training_chunks(model: GemmaForCausalLM, encoder: ChatEncoder) -> None:
    chunks = prepare([PlainText("a", TEXT)], encoder, max_seq_len=32, packing=True).examples
    trained = held_out_loss(model, [Collator(encoder.control.pad)(chunks)])
    for stride in (31, 32):
        total, count = scored(model, encoder, TEXT, window=32, stride=stride)
        assert total / count == pytest.approx(trained, rel=1e-10)
    overlapping, _ = scored(model, encoder, TEXT, window=32, stride=8)
    assert overlapping / count != pytest.approx(trained, rel=1e-3)


def test_context_is_what_a_window_says(model: GemmaForCausalLM, encoder: ChatEncoder) -> None:
    """The new tokens of the second window, scored by hand: BOS, the context, the new tokens."""
    body = encoder.encode_documents([PlainText("a", TEXT)])[0].input_ids[1:]
    pieces = pieces_of([PlainText("a", TEXT)], encoder, max_seq_len=32, window=32, stride=10).pieces
    losses = piece_losses(model, pieces, pad_id=encoder.control.pad, batch_size=4, on_progress=done)
    ids = torch.tensor([[encoder.control.bos, *body[10:41]]])
    logits = model(ids).logits[0, :-1].log_softmax(dim=-1)
    by_hand = -logits.gather(1, ids[0, 1:, None])[21:].sum()
    assert losses[1].tolist() == pytest.approx([by_hand.item(), 10], rel=1e-10)


QUESTIONS = [f"What is {n}?" + " Please." * n for n in range(5)]
ANSWERS = [f"It is {n}." * (n + 1) for n in range(5)]
CHATS = [
    Conversation(question, (Turn("user", question), Turn("assistant", answer)))
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


def test_rows_add_up_to_the_loss_of_training(model: GemmaForCausalLM, encoder: ChatEncoder) -> None:
    """Packed in training, alone here; every labelled token weighs the same."""
    packed = prepare(CHATS, encoder, max_seq_len=64, packing=True).examples
    trained = held_out_loss(model, [Collator(encoder.control.pad)(packed)])
    found = pieces_of(CHATS, encoder, max_seq_len=64, window=64, stride=32)
    results = []
    for batch_size in (1, 2, 5):
        losses = piece_losses(model, found.pieces, pad_id=0, batch_size=batch_size, on_progress=done)
        rows = loss_rows(losses, found)
        assert rows.shape == (5, 2)
        assert rows[:, 0].sum() / rows[:, 1].sum() == pytest.approx(trained, rel=1e-10)
        results.append(rows)
    assert np.allclose(results[0], results[1], rtol=1e-10)
    assert np.allclose(results[0], results[2], rtol=1e-10)


def test_rows_that_are_cut_or_dropped_are_counted(encoder: ChatEncoder) -> None:
    long = Conversation("long", (Turn("user", "word " * 80), Turn("assistant", "Yes.")))
    empty = Conversation("empty", (Turn("user", "Why?"), Turn("assistant", " ")))
    found = pieces_of([*CHATS, long, empty], encoder, max_seq_len=40, window=40, stride=20)
    assert (found.rows, found.stats.rows, found.stats.dropped, found.stats.dropped_empty) == (5, 7, 1, 1)
    assert found.stats.truncated == 2
    texts = pieces_of([PlainText("a", TEXT), PlainText("b", " ")], encoder, max_seq_len=40, window=40, stride=20)
    assert (texts.rows, texts.stats.rows, texts.stats.dropped_empty) == (1, 2, 1)


def test_a_single_document_is_resampled_by_windows(encoder: ChatEncoder) -> None:
    one = pieces_of([PlainText("a", TEXT)], encoder, max_seq_len=32, window=32, stride=16)
    two = pieces_of([PlainText("a", TEXT), PlainText("b", TEXT)], encoder, max_seq_len=32, window=32, stride=16)
    ones = np.ones((len(one.pieces), 2))
    assert loss_rows(ones, one).shape == ones.shape
    assert loss_rows(np.ones((len(two.pieces), 2)), two).tolist() == [[len(one.pieces)] * 2] * 2


def test_logits_of_a_sequence_are_never_built(model: GemmaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows with a label meet the head: here 3 of 40."""
    seen: list[int] = []
    from gemma_ft.model import lm_head

    real = lm_head.fused_cross_entropy
    monkeypatch.setattr(
        lm_head, "fused_cross_entropy", lambda *a, **more: (seen.append(len(a[0])), real(*a, **more))[1]
    )
    ids = torch.randint(4, VOCAB, (40,)).tolist()
    piece = Piece(ids, [IGNORE] * 37 + ids[-3:], 0)
    losses = piece_losses(model, [piece], pad_id=0, batch_size=1, on_progress=done)
    assert seen == [3]
    assert losses[0, 1] == 3


def test_progress_counts_pieces(model: GemmaForCausalLM) -> None:
    heard: list[int] = []
    pieces = [Piece([2, 5, 6], [IGNORE, 5, 6], row) for row in range(5)]
    piece_losses(model, pieces, pad_id=0, batch_size=2, on_progress=heard.append)
    assert heard == [2, 2, 1]


def test_damaged_weights_are_told() -> None:
    broken = ours("gemma-2b")
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(UserError) as error:
        piece_losses(broken, [Piece([2, 5], [IGNORE, 5], 0)], pad_id=0, batch_size=1, on_progress=done)
    assert str(error.value) == "the held-out loss is not finite: the model's weights are damaged"


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_head_that_was_trained_with_the_embedding_is_scored(module: str, encoder: ChatEncoder) -> None:
    """Switched on as the merged model scores, switched off as the base."""

    def loss(model: Any) -> Any:
        return piece_losses(model, pieces, pad_id=encoder.control.pad, batch_size=2, on_progress=done)

    shape: dict[str, Any] = {"dtype": torch.float64, "vocab_size": 2048}
    pieces = pieces_of([PlainText("a", TEXT)], encoder, max_seq_len=32, window=32, stride=16).pieces
    settings = {"target_modules": ["q_proj"], "modules_to_save": [module], "ensure_weight_tying": True}
    wrapped = wrap(ours("gemma-2-2b", **shape), **settings).eval()
    on, base = loss(wrapped), loss(ours("gemma-2-2b", **shape))
    with adapter_off(wrapped):
        assert loss(wrapped) == pytest.approx(base, rel=1e-10)
    assert on != pytest.approx(base, rel=1e-3)
    assert loss(wrapped.merge_and_unload()) == pytest.approx(on, rel=1e-6)


def test_a_head_that_carries_lora_is_scored_by_what_it_says() -> None:
    wrapped = wrap(ours("gemma-2b"), target_modules=["lm_head"]).eval()
    ids = torch.tensor([2, 5, 9, 7])
    found = piece_losses(wrapped, [Piece(ids.tolist(), [IGNORE, 5, 9, 7], 0)], pad_id=0, batch_size=1, on_progress=done)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(wrapped(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
    assert found[0, 0] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (2, 1, "--window: expected 3 to 64 tokens, the context of the model, got 2"),
        (65, 1, "--window: expected 3 to 64 tokens, the context of the model, got 65"),
        (32, 0, "--stride: expected 1 to 32 tokens, the window, got 0; more would leave text out"),
        (32, 33, "--stride: expected 1 to 32 tokens, the window, got 33; more would leave text out"),
    ],
)
def test_windows_that_cannot_be(window: int, stride: int, message: str) -> None:
    with pytest.raises(DataError) as error:
        check_window(window, stride, 64)
    assert str(error.value) == message
