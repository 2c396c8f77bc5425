"""The vocabulary of a GGUF made of tokenizer.json alone: SentencePiece, given its pieces, scores and kinds, finds the
ids of training, and so does llama.cpp, whose algorithm is the same. What it would cut otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import GemmaTokenizer

from gemma_ft.data.encode.tokenizer import ContentEncoder, add_tokens, load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export.gguf_pieces import BYTE, CONTROL, NORMAL, USER_DEFINED
from gemma_ft.export.gguf_tokenizer import GgufVocabulary, read_vocabulary
from tests.quirky_tokenizer import TEXTS, TINY, model_of, write_quirky


def sentencepiece_of(vocabulary: GgufVocabulary) -> SentencePieceProcessor:
    """SentencePiece with the pieces of a GGUF: what llama.cpp is a second version of."""
    return SentencePieceProcessor(model_proto=model_of(vocabulary))


def register_runs(tokenizer: Any) -> Any:
    """A Gemma 1's with turn tokens, runs and tags as added tokens, of spaces in the normalized text."""
    names = [name for name in tokenizer.get_vocab() if name[0] in "<[" or (len(name) > 1 and not name.strip("\n▁\t"))]
    fixed = [name for name in names if name == "</s>" or name[-1] in ">\n▁\t" or name == "[toxicity=0]"]
    kept = [name for name in fixed if not name.startswith("<0x")]
    tokenizer.add_tokens([AddedToken(name, normalized=name[0] == "▁", special=False) for name in kept])
    return tokenizer


MAKERS: dict[str, Callable[[Path], Any]] = {
    "tiny": lambda _: load_tokenizer(str(TINY)),
    "gemma2": lambda folder: load_tokenizer(str(write_quirky(folder, "gemma2"))),
    "gemma1, registered": lambda folder: register_runs(load_tokenizer(str(write_quirky(folder, "gemma1")))),
    "saved by transformers": lambda folder: resaved(write_quirky(folder / "first", "gemma2"), folder / "again"),
    # its merges are ranked by id: of 31 blanks and more it makes other ids than SentencePiece, and so did training
    "tokenizer.model as transformers reads it": lambda folder: resaved(copied(folder / "first"), folder / "again"),
}


def copied(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return folder


def resaved(folder: Path, again: Path) -> Any:
    """What every other tool leaves: tokenizer.json, and no tokenizer.model."""
    GemmaTokenizer.from_pretrained(str(folder)).save_pretrained(str(again))
    return load_tokenizer(str(again))


@pytest.mark.parametrize("name", MAKERS)
def test_sentencepiece_finds_the_ids_of_training(name: str, tmp_path: Path) -> None:
    """SentencePiece 0.2.3. The build before asked for tokenizer.model, or refused the tab of a whole folder."""
    tokenizer = MAKERS[name](tmp_path)
    vocabulary = read_vocabulary(tokenizer, rows=4096)
    found, trained = sentencepiece_of(vocabulary).encode(TEXTS), ContentEncoder(tokenizer).encode_many(TEXTS)
    different = [text for text, *ids in zip(TEXTS, found, trained, strict=True) if ids[0] != ids[1]]
    assert different == []


@pytest.mark.parametrize("beside", ["the same pieces", "another tokenizer's", "damaged", "none"])
def test_a_tokenizer_model_beside_changes_nothing(beside: str, tmp_path: Path) -> None:
    """The ids of training are those of tokenizer.json, where there is one."""
    write_quirky(tmp_path, "gemma2")
    expected = read_vocabulary(load_tokenizer(str(tmp_path)), rows=4096)
    pieces = (TINY / "tokenizer.model").read_bytes()
    made = {"the same pieces": pieces, "another tokenizer's": pieces.replace("▁exam".encode(), "▁exaM".encode(), 1),
            "damaged": b"\xff\xff\xff"}  # fmt: skip
    if beside in made:
        (tmp_path / "tokenizer.model").write_bytes(made[beside])
    assert read_vocabulary(load_tokenizer(str(tmp_path)), rows=4096) == expected


def test_a_byte_under_its_character_is_a_byte_piece(tmp_path: Path) -> None:
    """transformers 5.24 convert_slow_tokenizer.py, GemmaConverter.vocab: `<0x09>` is "\\t" in tokenizer.json."""
    tokenizer = load_tokenizer(str(TINY))
    assert tokenizer.convert_ids_to_tokens(57) == "\t"
    found = read_vocabulary(tokenizer, rows=2048)
    assert (found.tokens[57], found.kinds[57]) == ("<0x09>", BYTE)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    for byte, character in (("<0x0D>", "\r"), ("<0x00>", "\x00"), ("<0x7F>", "\x7f")):  # any other one as well
        vocab[character] = vocab.pop(byte)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    others = read_vocabulary(load_tokenizer(str(tmp_path)), rows=2048)
    assert (others.tokens, others.kinds) == (found.tokens, found.kinds)


def test_a_character_with_a_token_beside_its_byte_is_no_byte(tmp_path: Path) -> None:
    """As in Gemma 3: "\\t" and `<0x09>` are two tokens."""
    spec = json.loads((write_quirky(tmp_path, "gemma2") / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    tab = vocab["\t"]
    vocab["<0x09>"], vocab["\t"] = tab, max(vocab.values()) + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(str(tmp_path))
    found = read_vocabulary(tokenizer, rows=4096)
    assert (found.tokens[tab], found.kinds[tab]) == ("<0x09>", BYTE)
    assert (found.tokens[vocab["\t"]], found.kinds[vocab["\t"]]) == ("\t", NORMAL)
    assert sentencepiece_of(found).encode("a\tb\t\tc") == ContentEncoder(tokenizer).encode("a\tb\t\tc")


def test_pieces_that_look_like_control_tokens_are_learned_ones(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_quirky(tmp_path, "gemma2")))
    found = read_vocabulary(tokenizer, rows=4096)
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert [kinds[name] for name in ("[...]", "</s", "====")] == [NORMAL] * 3
    assert [kinds[name] for name in ("<unused299>", "[toxicity=0]", "<start_of_turn>", "<pad>")] == [CONTROL] * 4
    assert [kinds[name] for name in ("\t\t", "\n" * 31, "<table>", "</s>")] == [USER_DEFINED] * 4


@pytest.mark.parametrize(
    ("names", "ends"),
    [(["<tool>", "</s>"], ["</s>"]), (["[EOS]", "<EOT>"], ["[EOS]", "<EOT>"]), (["<s>", "</S>", "<eot>", "</p>"], [])],
)
def test_text_that_llama_cpp_ends_an_answer_at_is_named(names: list[str], ends: list[str]) -> None:
    """llama.cpp src/llama-vocab.cpp: special_eog_ids are found by text."""
    tokenizer = load_tokenizer(str(TINY))
    add_tokens(tokenizer, [name for name in names if name != "</p>"])
    assert read_vocabulary(tokenizer, rows=2100).ends_by_text() == ends


def test_control_tokens_are_no_text_that_ends_an_answer() -> None:
    """<eos> and <end_of_turn> end an answer as trained; somebody else's <|im_end|> is no text either."""
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.add_tokens(["<|im_end|>"])
    assert read_vocabulary(tokenizer, rows=2100).ends_by_text() == []


def changed(folder: Path, change: Callable[[dict[str, Any]], None], style: Any = "gemma2") -> str:
    """The line with which a changed tokenizer is refused."""
    write_quirky(folder, style)
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError) as error:
        read_vocabulary(load_tokenizer(str(folder)), rows=5000)
    line = str(error.value)
    assert line.startswith(f"{folder}: its tokenizer ")
    assert line.endswith("; use --to hf instead")
    return line.removeprefix(f"{folder}: its tokenizer ").removesuffix("; use --to hf instead")


def without_merge(spec: dict[str, Any]) -> None:
    spec["model"]["merges"].remove(["ha", "ha"])


def without_byte(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"]["<0xAX>"] = spec["model"]["vocab"].pop("<0xAB>")


def by_turns(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    merges.append(merges.pop(merges.index(["ha", "ha"])))  # "haha" has other parts, whose merges stay


def reachable_control(spec: dict[str, Any]) -> None:
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": spec["model"]["vocab"]["haha"], "content": "haha"})


def blanks_around(spec: dict[str, Any]) -> None:
    next(token for token in spec["added_tokens"] if token["content"] == "<table>")["lstrip"] = True


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without_merge, "does not make 'haha' of 'ha' + 'ha', which llama.cpp would"),
        (without_byte, "has no token <0xAB>, and llama.cpp needs one for every byte"),
        (by_turns, "merges to 'haha' and to 'hahaha' by turns, which no scores can say"),
        (reachable_control, "does not make 'haha' of 'h' + 'aha', which llama.cpp would"),
        (blanks_around, "finds '<table>' with the blanks around it or as a whole word, GGUF has none"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_cut_otherwise_is_refused(
    change: Callable[[dict[str, Any]], None], line: str, tmp_path: Path
) -> None:
    assert changed(tmp_path, change) == line


def test_added_tokens_that_overlap_are_refused() -> None:
    tokenizer = load_tokenizer(str(TINY))
    add_tokens(tokenizer, ["@@ab", "b@@long"])
    with pytest.raises(UserError) as error:
        read_vocabulary(tokenizer, rows=2100)
    assert str(error.value) == (
        f"{TINY}: its tokenizer has tokens '@@ab' and 'b@@long', which overlap: llama.cpp takes the longer; "
        "use --to hf instead"
    )
