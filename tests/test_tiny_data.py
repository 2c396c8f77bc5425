"""The tiny Gemma's data: generator, task splits, tokenizer and config, as they are committed."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece
from transformers import AutoTokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
TINY = DATA / "gemma-tiny"
SPLITS = ("scheduling_train.jsonl", "scheduling_eval.jsonl")
SAMPLE_ROWS = 12_000


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The generator, imported as `python data/tiny_corpus.py` runs it: with data/ as the place of its modules."""
    monkeypatch.syspath_prepend(str(DATA))
    return importlib.import_module("tiny_corpus")


@pytest.fixture
def tokenizer():
    """The committed tokenizer as transformers reads it."""
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def pieces() -> sentencepiece.SentencePieceProcessor:
    """The committed tokenizer as SentencePiece reads it."""
    return sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))


def read(name: str) -> list[dict]:
    """The rows of a committed jsonl file."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def texts(row: dict) -> list[str]:
    """The contents of a row's turns."""
    return [message["content"] for message in row["messages"]]


def objects_in(text: str) -> list[dict]:
    """Every JSON object that starts somewhere in a text."""
    decoder, found = json.JSONDecoder(), []
    for start, character in enumerate(text):
        if character == "{":
            try:
                found.append(decoder.raw_decode(text, start)[0])
            except json.JSONDecodeError:
                continue
    return found


def test_generator_writes_the_same_bytes_twice(corpus, tmp_path):
    for name in ("once", "again"):
        corpus.write_jsonl(corpus.corpus_rows(500), tmp_path / f"{name}.jsonl")
        corpus.write_jsonl(corpus.probe_rows(50), tmp_path / f"{name}_probe.jsonl")
    assert (tmp_path / "once.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert (tmp_path / "once_probe.jsonl").read_bytes() == (tmp_path / "again_probe.jsonl").read_bytes()
    assert len((tmp_path / "once.jsonl").read_text(encoding="utf-8").splitlines()) == 500


def test_another_seed_gives_another_corpus(corpus):
    assert list(corpus.corpus_rows(20, seed=1)) != list(corpus.corpus_rows(20, seed=2))


def test_committed_splits_are_what_the_generator_writes(corpus, tmp_path):
    for rows, name in zip(corpus.task_rows(), SPLITS, strict=True):
        corpus.write_jsonl(rows, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_no_request_occurs_twice_within_or_between_the_splits():
    asked = [texts(row)[0] for name in SPLITS for row in read(name)]
    assert len(asked) == 2200
    assert len(set(asked)) == len(asked)


def test_every_answer_is_one_line_of_json_with_the_schema(corpus):
    from_words = importlib.import_module("tiny_words")
    for name in SPLITS:
        for row in read(name):
            request, answer = texts(row)
            fields = json.loads(answer)
            assert tuple(fields) == from_words.TASK_KEYS
            assert "\n" not in answer
            assert all(fields[key] in request for key in ("event", "with", "day"))
            assert re.fullmatch(r"(0[7-9]|1\d|20):[0-5][05]", fields["time"])
            assert type(fields["minutes"]) is int
            assert 0 < fields["minutes"] <= 180


@pytest.mark.parametrize(
    ("hour", "minute", "spoken", "half"),
    [
        (14, 30, "half past two in the afternoon", "2:30 pm"),
        (8, 45, "quarter to nine in the morning", "8:45 am"),
        (12, 0, "noon", "12 pm"),
        (12, 40, "twenty to one in the afternoon", "12:40 pm"),
        (20, 5, "five past eight in the evening", "8:05 pm"),
        (9, 0, "nine o'clock in the morning", "9 am"),
        (11, 55, "five to twelve in the morning", "11:55 am"),
    ],
)
def test_times_are_said_rightly(corpus, hour, minute, spoken, half):
    tasks = importlib.import_module("tiny_tasks")
    assert tasks.time_in_words(hour, minute) == spoken
    assert tasks.time_with_half(hour, minute) == half


def test_the_corpus_never_holds_the_schema_nor_a_held_out_request(corpus):
    keys = set(importlib.import_module("tiny_words").TASK_KEYS)
    kept_out = {texts(row)[0] for name in SPLITS for row in read(name)}
    seen: set[str] = set()
    for row in corpus.corpus_rows(SAMPLE_ROWS):
        question, answer = texts(row)
        assert question.split("\n")[0] not in kept_out
        for found in objects_in(question) + objects_in(answer):
            assert len(keys & set(found)) <= 2, found
            seen |= keys & set(found)
    assert seen == keys  # each key word is learned in objects of other schemas


def test_every_token_of_the_answers_occurs_in_answers_of_the_corpus(corpus, tokenizer):
    def ids(rows, turn: int) -> set[int]:
        return {token for row in rows for token in tokenizer(texts(row)[turn], add_special_tokens=False).input_ids}

    known = ids(corpus.corpus_rows(SAMPLE_ROWS), 1)
    missing = set().union(*(ids(read(name), 1) for name in SPLITS)) - known
    assert not missing, tokenizer.convert_ids_to_tokens(sorted(missing))


def test_special_tokens_by_name(tokenizer, pieces):
    for token_id, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")):
        assert tokenizer.convert_tokens_to_ids(name) == pieces.piece_to_id(name) == token_id
    for name in ("<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "<table>", "</code>"):
        assert tokenizer(name, add_special_tokens=False).input_ids == [pieces.piece_to_id(name)]
        assert pieces.piece_to_id(name) != pieces.unk_id()
    assert len(tokenizer) == pieces.get_piece_size() == json.loads((TINY / "config.json").read_text())["vocab_size"]


def test_one_bos_is_added(tokenizer):
    assert tokenizer("hello").input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("hello").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "a  b", "  lead", "trail   ", "a\n\n\nb", "\n" * 11 + "x", "tab\tand \u00fcn\u00efcode", "12:34 5678", "",
        "emoji \U0001f999 \U0001f469\u200d\U0001f467", "\u4e2d\u6587 and \u05e2\u05d1",
        "<table><tr><td>1</td></tr></table>", "<start_of_turn>user\nhi<end_of_turn>\n",
    ],
)  # fmt: skip
def test_transformers_and_sentencepiece_agree_and_round_trip(tokenizer, pieces, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text
    assert pieces.unk_id() not in ids


def test_transformers_and_sentencepiece_agree_on_the_corpus(corpus, tokenizer, pieces):
    said = [text for row in corpus.corpus_rows(2000) for text in texts(row)]
    assert tokenizer(said, add_special_tokens=False).input_ids == pieces.encode(said)


def test_digits_are_split(tokenizer):
    assert tokenizer.tokenize("14:30") == ["1", "4", ":", "3", "0"]


def test_tokenizer_settings_name_no_place_on_a_machine():
    stored = json.loads((TINY / "tokenizer_config.json").read_text())
    assert stored["add_bos_token"] is True
    assert "/" not in json.dumps({key: value for key, value in stored.items() if key != "chat_template"})


def test_config_is_a_whole_gemma_2_that_no_tool_mistakes_for_a_real_size():
    config = json.loads((TINY / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Gemma2ForCausalLM"], "gemma2")
    assert config["num_hidden_layers"] not in (26, 42, 46)
    assert config["query_pre_attn_scalar"] == config["head_dim"]
    assert config["sliding_window"] < 192  # shorter than the sequences of its training
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)
    assert config["tie_word_embeddings"] is True


def test_generation_stops_at_eos_and_at_the_end_of_a_turn(tokenizer):
    stored = json.loads((TINY / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]


def test_sizes_in_the_repository():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    assert sum(path.stat().st_size for path in DATA.glob("*.jsonl")) <= 1_000_000
