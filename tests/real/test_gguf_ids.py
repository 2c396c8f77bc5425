"""Gemma's published tokenizers: our ids are SentencePiece's and llama.cpp's, from tokenizer.json alone and from
tokenizer.model alone. What may differ is listed here, and nothing else may.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemma_ft.data.encode.tokenizer import ContentEncoder, load_tokenizer
from gemma_ft.export.export import ExportOptions
from gemma_ft.ui.export import export_and_show
from tests.real import llama_child
from tests.real.corpus import STRIKE_END, has_sign_run, lines, spells_control
from tests.real.sentencepiece_model import processor, published_order, rebuilt_model

FAMILIES = ("gemma1", "gemma2")
ENDS = {"1": "<eos>", "107": "<end_of_turn>", "213": STRIKE_END}  # the last by its text alone


@dataclass(frozen=True)
class Published:
    """A published tokenizer, opened, with our ids of the corpus."""

    folder: Path
    tokenizer: Any
    texts: list[str]
    ids: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def published(request: pytest.FixtureRequest) -> Published:
    folder = Path(request.getfixturevalue(f"{request.param}_tokenizer"))
    tokenizer, texts = load_tokenizer(str(folder)), lines()
    return Published(folder, tokenizer, texts, ContentEncoder(tokenizer).encode_many(texts))


def differing(published: Published, others: list[list[int]]) -> list[str]:
    return [text for text, *ids in zip(published.texts, published.ids, others, strict=True) if ids[0] != ids[1]]


def test_the_corpus_is_varied_and_the_same_everywhere() -> None:
    texts = lines()
    assert texts == lines()
    assert len(texts) == len(set(texts)) >= 3000
    assert sum(map(spells_control, texts)) > 100
    assert len({character for text in texts for character in text}) > 1500


def test_ids_are_those_of_sentencepiece(published: Published) -> None:
    """SentencePiece 0.2.3, with tokenizer.model rebuilt. Runs of U+2581 are found in raw text in tokenizer.json."""
    assert published_order(published.folder / "tokenizer.json")
    found = processor(rebuilt_model(published.folder / "tokenizer.json")).encode(published.texts)
    assert [text for text in differing(published, found) if not has_sign_run(text)] == []


def test_ids_are_those_of_transformers_where_no_control_token_is_spelt(published: Published) -> None:
    found = published.tokenizer(published.texts, add_special_tokens=False).input_ids
    assert [text for text in differing(published, found) if not spells_control(text)] == []


def test_tokenizer_model_alone_is_the_published_tokenizer(gemma2_tokenizer: Path, tmp_path: Path) -> None:
    """Vocabulary, all 580,604 merges and 249 added tokens, flags included."""
    folder = Path(gemma2_tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(rebuilt_model(folder / "tokenizer.json", typed=True))
    made, published = load_tokenizer(str(tmp_path)), load_tokenizer(str(folder))
    specs = [json.loads(one.backend_tokenizer.to_str()) for one in (made, published)]
    for key in ("vocab", "merges"):
        assert specs[0]["model"][key] == specs[1]["model"][key], key
    assert specs[0]["added_tokens"] == specs[1]["added_tokens"]
    assert ContentEncoder(made).sha256 == ContentEncoder(published).sha256
    assert ContentEncoder(made).encode("a" + " " * 32 + "b") == [235250, 168, 518]


def test_llama_cpp_gives_the_ids_of_training(
    published: Published, llama_cpp: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """llama.cpp in xllamacpp 2026.10.11549, on a GGUF made without any tokenizer.model."""
    model: Path = request.getfixturevalue(request.node.callspec.params["published"])
    console = Console(file=io.StringIO(), width=200)
    export_and_show(str(model), ExportOptions(to="gguf", out=tmp_path / "x.gguf"), console=console)
    assert "note: llama.cpp takes </s> for the end of an answer" in console.file.getvalue()  # type: ignore[attr-defined]
    done = subprocess.run(
        [sys.executable, llama_child.__file__, str(tmp_path / "x.gguf")],
        input=json.dumps({"texts": published.texts}), capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(llama_cpp)},
    )  # fmt: skip
    found = json.loads(done.stdout)
    different = differing(published, found["ids"])
    assert [text for text in different if not has_sign_run(text) and STRIKE_END not in text] == []
    assert (found["ends"], found["add_bos"], found["bos"], found["eos"], found["eot"]) == (ENDS, True, 2, 1, 107)
    decoded = zip(published.texts, found["decoded"], strict=True)
    assert [text for text, again in decoded if text.replace("\u2581", " ") != again] == []
