"""The preferences on the scheduling task and the adapter that learns from them, as they are committed."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.shared.preferred_form import answered, fields_of, measured, pairs_in
from gemma_ft.build.place import place_of
from gemma_ft.data.encode.tokenizer_files import brings_tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
SPLITS = ("preferences_train.jsonl", "preferences_eval.jsonl")
ANSWERS = 20


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The generator, imported as `python data/tiny_corpus.py` runs it: with data/ as the place of its modules."""
    monkeypatch.syspath_prepend(str(DATA))
    return importlib.import_module("tiny_corpus")


def pairs() -> list[dict[str, str]]:
    """The committed pairs of both splits."""
    return [pair for name in SPLITS for pair in pairs_in(DATA / name)]


def test_committed_pairs_are_what_the_generator_writes(corpus, tmp_path):
    for rows, name in zip(corpus.pair_rows(), SPLITS, strict=True):
        corpus.write_jsonl(rows, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_no_request_is_in_two_places(corpus):
    asked = [pair["prompt"] for pair in pairs()]
    tasked = [corpus.first_text(row) for split in corpus.task_rows() for row in split]
    assert len(asked) == 700
    assert len({*asked, *tasked}) == len(asked) + len(tasked)


def test_both_halves_say_the_same_and_the_day_comes_first_in_the_chosen_one(corpus):
    preferences = importlib.import_module("tiny_preferences")
    words = importlib.import_module("tiny_words")
    for pair in pairs():
        chosen, rejected = json.loads(pair["chosen"]), json.loads(pair["rejected"])
        assert chosen == rejected
        assert (tuple(chosen), tuple(rejected)) == (preferences.DAY_FIRST, words.TASK_KEYS)
        assert sorted(pair["chosen"]) == sorted(pair["rejected"])


def test_length_is_no_way_to_tell_the_halves_apart():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gemma-tiny")
    for pair in pairs():
        chosen, rejected = (tokenizer(pair[half]).input_ids for half in ("chosen", "rejected"))
        assert len(chosen) == len(rejected)


def test_the_start_is_tuned_on_the_task_in_both_orders(corpus):
    preferences = importlib.import_module("tiny_preferences")
    rows, turned = corpus.task_rows()[0], 0
    for row, other in zip(rows, preferences.both_orders(rows, corpus.ORDER_SEED), strict=True):
        (question, answer), (asked, said) = row["messages"], other["messages"]
        assert question == asked
        assert json.loads(answer["content"]) == json.loads(said["content"])
        turned += answer != said
    assert abs(turned / len(rows) - preferences.HABIT) < 0.02


def test_the_adapter_names_its_base_as_it_ships(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    place = place_of("data/scheduling-adapter")
    assert place.adapter == DATA / "scheduling-adapter"
    assert place.of_base.folder == DATA / "gemma-tiny"
    assert (place.contract.base, place.of_adapter.fields["base_model_name_or_path"]) == ("data/gemma-tiny",) * 2
    assert place.contract.base_sha256 == place.of_base.sha256
    assert place.contract.adapter_sha256 == place.of_adapter.hash
    assert not brings_tokenizer(place.adapter)


def test_the_adapter_does_the_task_and_has_the_preferred_order_less_often_than_not():
    forms, texts = answered("data/scheduling-adapter", pairs_in(DATA / SPLITS[1], ANSWERS), dtype=torch.float32)
    assert forms.answers == len(texts) == ANSWERS
    assert forms.right >= 0.9
    assert 0 < forms.preferred < 0.6
    assert forms.ended == 1


def test_forms_are_counted_by_order_and_content_apart():
    pair = {"prompt": "?", "chosen": '{"b": 1, "a": 2}', "rejected": '{"a": 2, "b": 1}'}
    texts = ['{"b": 1, "a": 2}', '{"a": 2, "b": 1}', '{"b": 1, "a": 3}', "b 1", "[1]"]
    found = measured([pair] * 5, texts, [[1, 2], [1], [1], [1], []], [True, True, True, True, False])
    assert (found.answers, found.preferred, found.right, found.ended) == (5, 2 / 5, 2 / 5, 4 / 5)
    assert (found.mean_tokens, found.mean_characters) == (1.0, (16 * 3 + 3 + 3) / 5)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"a": 1} and more'])
def test_what_is_no_object_has_no_fields(text):
    assert fields_of(text) is None


def test_sizes_in_the_repository():
    assert sum(path.stat().st_size for path in (DATA / "scheduling-adapter").iterdir()) <= 600_000
