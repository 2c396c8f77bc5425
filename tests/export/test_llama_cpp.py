"""llama.cpp on what we export: the same ids, the same logits within its arithmetic, the same greedy text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.llama_cpp import (
    LENGTHS,
    QUESTIONS,
    TEXTS,
    TYPES,
    amx_fault,
    llama_greedy,
    llama_logits,
    loud_gemma_1,
    open_gguf,
    our_greedy,
    our_logits,
    put_stored_weights,
)
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_model
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.export.gguf_file import plan_gguf, write_gguf
from gemma_ft.export.gguf_tokenizer import read_vocabulary
from gemma_ft.export.merge.merged import MergedWeights
from tests.export.tuned import TINY

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source, in ten minutes")
# Largest |difference| of logits over the largest |logit|, with the file's weights on both sides: what remains is
# llama.cpp's arithmetic on CPU. Its GELU is a table of float16 (one step is 2^-11 of the value), in every type; before
# each product activations are rounded to the type of the weights: float16 (2^-11), bf16 (2^-8), or 8 bits in blocks of
# 32 (1/254 of the largest). Errors of three to six layers add up: four to eight such steps, 16 for q8_0, whose step is
# that of the block's largest element.
WITHIN = {"f32": 2e-3, "f16": 4e-3, "bf16": 3e-2, "q8_0": 1.2e-1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both families in every type, and their folders."""
    root = tmp_path_factory.mktemp("llama")
    made = {"gemma2": Path(TINY), "gemma": loud_gemma_1(root / "gemma")}
    for family, folder in list(made.items()):
        weights, tokenizer = MergedWeights(place_of(folder), []), load_tokenizer(str(folder))
        vocabulary = read_vocabulary(tokenizer, rows=weights.vocab_size)
        for kind in TYPES:
            made[f"{family}-{kind}"] = root / f"{family}-{kind}.gguf"
            plan, out = plan_gguf(weights, kind), made[f"{family}-{kind}"]
            write_gguf(plan, weights, tokenizer, vocabulary, out, name=family)
    return made


@pytest.fixture
def opened(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[tuple[Path, Path, Any]]:
    """Folder, file and llama.cpp of one family in one type."""
    family, kind = request.param
    if fault := amx_fault(kind):
        pytest.skip(fault)
    llama = open_gguf(files[f"{family}-{kind}"], max(LENGTHS) + 40)
    yield files[family], files[f"{family}-{kind}"], llama
    llama.close()


def each(*kinds: str) -> pytest.MarkDecorator:
    cases = [(family, kind) for family in ("gemma2", "gemma") for kind in kinds]
    return pytest.mark.parametrize("opened", cases, indirect=True, ids=["-".join(case) for case in cases])


def questions(folder: Path) -> tuple[ChatEncoder, list[list[int]]]:
    encoder = ChatEncoder(load_tokenizer(str(folder)))
    return encoder, [encoder.encode_prompt([Turn("user", question)]) for question in QUESTIONS]


@each(*TYPES)
def test_logits_are_ours_within_llama_cpps_arithmetic(opened: tuple[Path, Path, Any]) -> None:
    """Shorter than the window, and far past it."""
    folder, path, llama = opened
    model = load_model(folder, dtype=torch.float32)
    put_stored_weights(model, path)
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        ids = [2, *torch.randint(7, 2048, (length - 1,), generator=generator).tolist()]
        found, expected = llama_logits(llama, ids), our_logits(model, ids)
        assert np.abs(found - expected).max() <= WITHIN[path.stem.split("-")[1]] * np.abs(expected).max(), length


@each("f32")
def test_greedy_answers_are_ours(opened: tuple[Path, Path, Any]) -> None:
    folder, _, llama = opened
    model, (encoder, asked) = load_model(folder, dtype=torch.float32), questions(folder)
    for ids in asked[::2]:
        assert llama_greedy(llama, ids, encoder.stop_ids, 24) == our_greedy(model, ids, encoder.stop_ids, 24)


@pytest.mark.parametrize("opened", [("gemma2", kind) for kind in TYPES[1:]], indirect=True, ids=TYPES[1:])
def test_greedy_answers_of_a_trained_model_survive_rounding(opened: tuple[Path, Path, Any]) -> None:
    """Of an answer that it is sure of: where two tokens are about as likely, a rounding may choose the other."""
    folder, _, llama = opened
    model, (encoder, asked) = load_model(folder, dtype=torch.float32), questions(folder)
    expected = our_greedy(model, asked[-1], encoder.stop_ids, 24)
    assert encoder.tokenizer.decode(expected) == "14:30"
    assert llama_greedy(llama, asked[-1], encoder.stop_ids, 24) == expected


@each("f32")
def test_texts_have_our_ids(opened: tuple[Path, Path, Any]) -> None:
    """As content, where nothing typed is a control token; and as a prompt, where control tokens are."""
    folder, _, llama = opened
    tokenizer = load_tokenizer(str(folder))
    encoder = ChatEncoder(tokenizer)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == encoder.content.encode(text), text
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text


@each("f32")
def test_it_knows_bos_and_both_stop_tokens(opened: tuple[Path, Path, Any]) -> None:
    import llama_cpp

    folder, _, llama = opened
    encoder, vocabulary = ChatEncoder(load_tokenizer(str(folder))), llama._model.vocab
    assert llama_cpp.llama_vocab_get_add_bos(vocabulary) is True
    ends = [id for id in range(2048) if llama_cpp.llama_vocab_is_eog(vocabulary, id)]
    assert ends == sorted(encoder.stop_ids)


@pytest.mark.parametrize("opened", [("gemma2", "f32")], indirect=True, ids=["f32"])
def test_its_chat_is_the_trained_one(opened: tuple[Path, Path, Any]) -> None:
    """llama-cpp-python renders the template of the file: the answer is that of our ids, with one BOS."""
    folder, _, llama = opened
    model, (encoder, _) = load_model(folder, dtype=torch.float32), questions(folder)
    turns = [Turn("system", "Be brief."), Turn("user", QUESTIONS[0])]
    ids = encoder.encode_prompt(turns)
    expected = encoder.tokenizer.decode(our_greedy(model, ids, encoder.stop_ids, 32))
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    answer = llama.create_chat_completion(messages, temperature=0.0, max_tokens=32, repeat_penalty=1.0)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == len(ids)
