"""A batch is its examples, padded at the right."""

import torch

from gemma_ft.data.conversation import Conversation, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.arrange import prepare
from gemma_ft.data.pack.collate import Collator


def test_batch_is_padded_at_the_right() -> None:
    examples = [
        {"input_ids": [2, 7, 2], "labels": [-100, 7, -100], "position_ids": [0, 1, 0], "document_ids": [0, 0, 1]},
        {"input_ids": [2], "labels": [-100], "position_ids": [0], "document_ids": [0]},
    ]
    batch = Collator(pad_id=9)(examples)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 7, 2], [2, 9, 9]],
        "labels": [[-100, 7, -100], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "position_ids": [[0, 1, 0], [0, 0, 0]],
        "document_ids": [[0, 0, 1], [0, -1, -1]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert examples[1]["input_ids"] == [2]


def test_lengths_are_padded_to_a_multiple() -> None:
    row = {"input_ids": [2] * 65, "labels": [7] * 65, "position_ids": [*range(65)], "document_ids": [0] * 65}
    for size, multiple, tokens in ((65, 1, 65), (65, 128, 128), (64, 64, 64), (65, 64, 128)):
        batch = Collator(0, multiple=multiple)([{name: column[:size] for name, column in row.items()}])
        assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, tokens)}
        assert int(batch["attention_mask"].sum()) == size


def test_weights_are_padded_with_nothing_and_a_blank_row_has_none() -> None:
    whole = {"input_ids": [2, 7], "labels": [-100, 7], "position_ids": [0, 1], "document_ids": [0, 0]}
    blank = {"input_ids": [9], "labels": [-100], "position_ids": [0], "document_ids": [-1]}
    batch = Collator(pad_id=9)([whole | {"loss_weights": [0.5, 0.5]}, blank])
    assert batch["loss_weights"].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert batch["loss_weights"].dtype == torch.float32


def test_every_prepared_example_comes_back_from_its_batch(encoder: ChatEncoder) -> None:
    items = [Conversation("x:1", (Turn("user", "word " * size), Turn("assistant", "yes"))) for size in (1, 9, 4, 30)]
    examples = prepare(items, encoder, max_seq_len=64, packing=True).examples
    batch = Collator(encoder.control.pad)(examples)
    for index, example in enumerate(examples):
        real = batch["attention_mask"][index].bool()
        for name, column in example.items():
            assert batch[name][index][real].tolist() == column
        assert set(batch["labels"][index][~real].tolist()) <= {-100}
