"""From the sources of a recipe to pairs: mixed, capped, repeated and parted as pairs, and found again in the cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.build.data import BuiltData, build_data
from gemma_ft.build.inputs import build_tokenizer
from gemma_ft.data.conversation import Conversation, Pair
from gemma_ft.data.encode import cache as cache_module
from gemma_ft.data.pack.collate_preferences import PreferenceCollator, answers_of
from gemma_ft.data.pack.preferences import PreferenceExamples
from gemma_ft.errors import DataError
from gemma_ft.recipe.load import load_recipe
from gemma_ft.system.limits import IGNORE

ROOT = Path(__file__).resolve().parents[2]
Build = Callable[..., BuiltData]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(load_recipe(ROOT / "recipes" / "sft_tiny.yaml").recipe)


@pytest.fixture
def build(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.chdir(tmp_path)
    words = ["data.eval=null", "data.packing=false", "data.max_seq_len=128", "objective.kind=dpo"]

    def built(*more: str) -> BuiltData:
        return build_data(load_recipe(ROOT / "recipes" / "sft_tiny.yaml", [*words, *more]).recipe, tokenizer)

    return built


def write(name: str, count: int, *, prompts: int = 1000, bad: tuple[int, ...] = ()) -> str:
    lines = [
        {
            "prompt": f"{name} {n % prompts}?",
            "chosen": f"Yes {n}, of {name}." + " Indeed." * (n % 3),
            "rejected": "" if n in bad else f"No {n}." + " Never." * (n % 5),
        }
        for n in range(count)
    ]
    Path(name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    return name


def seen(data: BuiltData) -> Counter[str]:
    """How often each pair is trained in an epoch; both halves of each example are of one row."""
    examples, found = data.train.examples, Counter[str]()
    for row in range(len(examples)):
        (only,) = set(examples.wheres(row))
        found[only] += 1
    return found


def test_sources_are_capped_and_mixed_by_pairs(build: Build) -> None:
    """An odd max_rows, a whole and a fractional repeat: all of pairs."""
    write("a.jsonl", 30), write("b.jsonl", 21)
    data = build("data.train=[{path: a.jsonl, max_rows: 7, repeats: 2}, {path: b.jsonl, repeats: 0.5}]")
    found = seen(data)
    per_file = {name: [n for where, n in found.items() if where.startswith(name)] for name in ("a", "b")}
    assert per_file["a"] == [2] * 7
    assert per_file["b"] == [1] * 10
    assert (data.stats.rows, len(data.train.examples), data.stats.documents) == (24, 24, 48)
    assert data.train_format.splitlines()[0].startswith("a.jsonl: 14 documents, ")


def test_weights_of_sources_are_of_pairs(build: Build) -> None:
    write("a.jsonl", 30), write("b.jsonl", 10)
    found = seen(build("data.train=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]"))
    assert Counter(where[0] for where in found.elements()) == {"a": 10, "b": 10}


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_prompt_stays_on_one_side_of_the_split(build: Build, kind: str) -> None:
    write("a.jsonl", 60, prompts=20)
    data = build("data.train=a.jsonl", "data.eval_fraction=0.3", f"objective.kind={kind}")
    held_out = {_asked(item) for item in data.held_out_items}
    trained = {int(where.rpartition(":")[2]) for where in seen(data)} if kind == "dpo" else None
    assert 0 < len(held_out) < 20
    assert data.overlap == 0
    each = 3 if kind == "dpo" else 6
    assert len(data.held_out_items) == each * len(held_out)
    assert data.held_out is not None
    assert len(data.held_out.examples) == min(200, len(data.held_out_items))
    assert len(data.train.examples) == each * (20 - len(held_out))
    if trained is not None:
        assert not held_out & {f"a.jsonl {(line - 1) % 20}?" for line in trained}


def _asked(item: Any) -> str:
    turns = item.prompt if isinstance(item, Pair) else item.turns
    return str(turns[0].content)


def test_held_out_prompts_that_are_trained_are_refused(build: Build) -> None:
    write("a.jsonl", 10)
    Path("b.jsonl").write_text(json.dumps({"prompt": "a.jsonl 3?", "chosen": "Other", "rejected": "Another"}) + "\n")
    with pytest.raises(DataError) as caught:
        build("data.train=a.jsonl", "data.eval=b.jsonl")
    assert str(caught.value) == (
        "data.eval: 1 held-out rows of 1 have the prompts of training rows, and their scores would mean little; take "
        "them out of data.train, or set eval.overlap: allow"
    )
    assert build("data.train=a.jsonl", "data.eval=b.jsonl", "eval.overlap=allow").overlap == 1


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_encoded_pairs_are_found_again(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The second time nothing is encoded, and the rows are the same; the same file read for another kind of objective
    is another entry.
    """
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / "cache"))
    write("a.jsonl", 40)
    first = build("data.train=a.jsonl", f"objective.kind={kind}")
    encoded: list[Any] = []
    original = cache_module.encode_chunk
    monkeypatch.setattr(cache_module, "encode_chunk", lambda *args: (encoded.append(args), original(*args)))
    again = build("data.train=a.jsonl", f"objective.kind={kind}")
    assert again.train.examples.fingerprint() == first.train.examples.fingerprint()
    assert encoded == []
    assert isinstance(again.train.examples, PreferenceExamples)
    build("data.train=a.jsonl", "objective.kind=sft")
    assert encoded != []


def test_bad_pairs_are_skipped_as_pairs(build: Build) -> None:
    write("a.jsonl", 2000, bad=(5,))
    data = build("data.train=a.jsonl", "data.on_bad_row=skip")
    assert list(data.skipped) == [("a.jsonl:6", "'rejected' is empty")]
    assert len(data.train.examples) == 1999
    with pytest.raises(DataError) as caught:
        build("data.train=a.jsonl")
    assert str(caught.value) == "a.jsonl:6: 'rejected' is empty"


def test_packed_or_not_the_answers_are_the_same(build: Build) -> None:
    """The examples are pairs in both; packing is of a batch (tests/data/test_pairs_to_batches.py)."""
    write("a.jsonl", 12)
    alone, packed = (build("data.train=a.jsonl", f"data.packing={word}") for word in ("false", "true"))
    assert alone.train.examples.fingerprint() == packed.train.examples.fingerprint()
    assert len(packed.train.examples) == 12
    counts = [len(PreferenceCollator(0, budget=one)(packed.train.examples[:])["sides"]) for one in (None, 128)]
    assert counts == [24, 24]


def test_kto_takes_pairs_apart(build: Build) -> None:
    write("a.jsonl", 9)
    data = build("data.train=a.jsonl", "objective.kind=kto")
    examples = data.train.examples
    assert [example["sides"] for example in examples[:]] == [[1], [0]] * 9
    for example in examples[:]:
        (only,) = answers_of(example)
        assert any(label != IGNORE for label in only["labels"])
    assert all(isinstance(item, Conversation) for item in data.held_out_items)
