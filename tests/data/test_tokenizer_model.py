"""A folder with tokenizer.model alone: SentencePiece's ids, and the very tokenizer that tokenizer.json is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import GemmaTokenizer

from gemma_ft.build.contract import contract_of
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import ContentEncoder, add_tokens, load_tokenizer
from gemma_ft.data.encode.tokenizer_model import note_of_pieces
from gemma_ft.errors import UserError
from gemma_ft.export.gguf_tokenizer import read_vocabulary
from tests.quirky_tokenizer import TEXTS, TINY, model_of, write_quirky

PIECES = TINY / "tokenizer.model"
# of the tiny tokenizer.model alone, in the version before, which let transformers rank its merges by id
SHA256_BEFORE = "eca07588adf80920dde7faf2ca8dd4d8c2a55994be019b597908e710e8f87978"


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with the tiny tokenizer.model and nothing else."""
    (tmp_path / "tokenizer.model").write_bytes(PIECES.read_bytes())
    return tmp_path


def sha256(folder: Path) -> str:
    return ContentEncoder(load_tokenizer(str(folder))).sha256


@pytest.mark.parametrize("pieces", ["tiny", "quirky"])
def test_ids_are_those_of_sentencepiece(pieces: str, tmp_path: Path) -> None:
    """SentencePiece 0.2.3. transformers 5.24 ranks merges by piece id, so long runs are cut otherwise."""
    model = PIECES.read_bytes()
    if pieces == "quirky":
        model = model_of(read_vocabulary(load_tokenizer(str(write_quirky(tmp_path / "json", "gemma2"))), rows=4096))
    (tmp_path / "tokenizer.model").write_bytes(model)
    found = ContentEncoder(load_tokenizer(str(tmp_path))).encode_many(TEXTS)
    expected = SentencePieceProcessor(model_proto=model).encode(TEXTS)
    control = ("<start_of_turn>",)  # the tiny model finds it in a text, as Gemma's does; here no text may become one
    texts = [text for text, *ids in zip(TEXTS, found, expected, strict=True) if ids[0] != ids[1]]
    assert [text for text in texts if not text.startswith(control)] == []


@pytest.mark.parametrize(("text", "names"), [
    ("a" + " " * 11 + "b", ["a", "▁" * 8, "▁▁▁", "b"]),
    ("a" + " " * 9 + "b", ["a", "▁" * 8, "▁b"]),
    (" " * 20, ["▁" * 8, "▁" * 8, "▁" * 4]),
    ("a\tb", ["a", "\t", "b"]),
])  # fmt: skip
def test_long_runs_are_cut_longest_first(text: str, names: list[str], alone: Path) -> None:
    tokenizer = load_tokenizer(str(alone))
    assert tokenizer.convert_ids_to_tokens(ContentEncoder(tokenizer).encode(text)) == names


def test_it_is_the_tokenizer_of_tokenizer_json(alone: Path) -> None:
    """So adapters of either folder fit the other: vocabulary, merges and added tokens are the same."""
    assert sha256(alone) == sha256(TINY)
    loaded, shipped = load_tokenizer(str(alone)), load_tokenizer(str(TINY))
    assert json.loads(loaded.backend_tokenizer.to_str()) == json.loads(shipped.backend_tokenizer.to_str())
    assert loaded("a\n\nb").input_ids == shipped("a\n\nb").input_ids


def test_tokenizer_json_decides_where_there_is_one(alone: Path) -> None:
    write_quirky(alone, "gemma1")
    before = sha256(alone)
    (alone / "tokenizer.model").write_bytes(b"\xff\xff")
    assert sha256(alone) == before != sha256(TINY)


def test_what_is_saved_is_the_same_tokenizer_and_names_no_place(alone: Path) -> None:
    load_tokenizer(str(alone)).save_pretrained(str(alone / "saved"))
    assert sha256(alone / "saved") == sha256(alone)
    assert str(alone) not in (alone / "saved" / "tokenizer_config.json").read_text()


def test_tokens_that_were_added_later_are_kept(alone: Path) -> None:
    """As transformers 5 saves them (added_tokens_decoder), and as versions before 5 did (added_tokens.json)."""
    older = {"<|im_start|>": 2048, "<|im_end|>": 2049}
    (alone / "added_tokens.json").write_text(json.dumps(older))
    found = load_tokenizer(str(alone))
    assert [found.convert_tokens_to_ids(name) for name in older] == [2048, 2049]
    assert found("<|im_end|>").input_ids == [2, 2049]
    decoder = {"2048": {"content": "<tool>", "normalized": False, "special": False}}
    (alone / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    found = load_tokenizer(str(alone))
    assert found.convert_ids_to_tokens(2048) == "<tool>"
    assert found.convert_tokens_to_ids("<|im_end|>") != 2049


def test_tokens_of_a_user_go_behind_it(alone: Path) -> None:
    tokenizer = load_tokenizer(str(alone))
    add_tokens(tokenizer, ["<tool>"])
    assert ContentEncoder(tokenizer).encode("a<tool>") == [*ContentEncoder(tokenizer).encode("a"), 2048]


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"\xff\xff\xff"])
def test_a_damaged_one_is_one_line(damage: bytes, alone: Path) -> None:
    (alone / "tokenizer.model").write_bytes(damage)
    assert message(alone) == f"{alone}/tokenizer.model: damaged; copy the base's there"


def test_one_of_another_kind_is_one_line(alone: Path) -> None:
    model: Any = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(PIECES.read_bytes())
    model.trainer_spec.model_type = 1  # unigram
    (alone / "tokenizer.model").write_bytes(model.SerializeToString())
    assert message(alone) == f"{alone}/tokenizer.model: not a Gemma tokenizer: its pieces are not merged by score (BPE)"


def test_a_run_of_the_version_before_is_refused_with_the_cure_and_goes_on_after_it(alone: Path) -> None:
    """Its ids were transformers' of tokenizer.model, which ranks merges by id: never mixed with these."""
    assert sha256(alone) != SHA256_BEFORE
    old = load_tokenizer(str(alone))
    note = note_of_pieces(old)
    assert note == (
        " (made of tokenizer.model alone, which transformers does with other ids for runs of blanks; "
        f"GemmaTokenizer.from_pretrained('{alone}').save_pretrained('{alone}') keeps those)"
    )
    GemmaTokenizer.from_pretrained(str(alone)).save_pretrained(str(alone))
    restored = load_tokenizer(str(alone))
    assert ContentEncoder(restored).sha256 == SHA256_BEFORE
    assert note_of_pieces(restored) == ""
    contract = contract_of(ChatEncoder(restored))
    contract.encoder(restored, alone)
    (alone / "tokenizer.json").unlink()
    (alone / "tokenizer_config.json").unlink()
    with pytest.raises(UserError) as caught:
        contract.encoder(load_tokenizer(str(alone)), alone)
    assert str(caught.value) == (
        f"{alone}: its vocabulary is not the one that was trained (gemma_ft.json); "
        "restore the tokenizer files that were saved with it"
    )
