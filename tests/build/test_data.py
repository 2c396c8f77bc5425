"""From the sources of a recipe to examples: mixed, capped, repeated, parted, with bad rows told or left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.build.data import BuiltData, build_data
from gemma_ft.build.inputs import build_tokenizer, inputs_of
from gemma_ft.errors import DataError, RecipeError
from gemma_ft.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
Build = Callable[..., BuiltData]
BAD = '{"question": null, "answer": "x"}'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(load_recipe(ROOT / "recipes" / "sft_tiny.yaml").recipe)


@pytest.fixture
def build(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.chdir(tmp_path)
    words = ["data.eval=null", "data.packing=false", "data.max_seq_len=128"]

    def built(*more: str) -> BuiltData:
        return build_data(load_recipe(ROOT / "recipes" / "sft_tiny.yaml", [*words, *more]).recipe, tokenizer)

    return built


def write(name: str, count: int, *, kind: str = "pair", bad: int = 0) -> str:
    rows = {
        "pair": lambda n: {"question": f"{name} {n}?", "answer": f"Answer {n} of {name}."},
        "text": lambda n: {"text": f"Document {n} of {name}."},
    }[kind]
    lines = [json.dumps(rows(n)) for n in range(count)] + [BAD] * bad
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def seen(data: BuiltData) -> Counter[str]:
    """How often each row is trained in an epoch."""
    examples = data.train.examples
    return Counter(where for row in range(len(examples)) for where in examples.wheres(row))


def per_file(data: BuiltData) -> dict[str, int]:
    found: Counter[str] = Counter()
    for where, times in seen(data).items():
        found[where.partition(":")[0]] += times
    return dict(found)


def refused(build: Build, *words: str) -> str:
    with pytest.raises(DataError) as caught:
        build(*words)
    return str(caught.value)


def test_several_sources_are_one_data_set(build: Build) -> None:
    write("a.jsonl", 30), write("b.jsonl", 20, kind="text")
    data = build("data.train=[a.jsonl, b.jsonl]")
    assert seen(data) == {**{f"a.jsonl:{n}": 1 for n in range(1, 31)}, **{f"b.jsonl:{n}": 1 for n in range(1, 21)}}
    assert data.train_source == "a.jsonl, b.jsonl"
    assert data.train_format.splitlines() == [
        "a.jsonl: 30 documents, prompt_completion: the rows have question, answer",
        "b.jsonl: 20 documents, text: the rows have text",
    ]


def test_caps_and_repeats(build: Build) -> None:
    write("a.jsonl", 30), write("b.jsonl", 20)
    data = build("data.train=[{path: a.jsonl, max_rows: 4, repeats: 3}, {path: b.jsonl, repeats: 0.5}]")
    found = seen(data)
    assert {where: times for where, times in found.items() if where.startswith("a")} == {
        f"a.jsonl:{n}": 3 for n in range(1, 5)
    }
    assert per_file(data) == {"a.jsonl": 12, "b.jsonl": 10}
    assert seen(build("data.train=[{path: a.jsonl, max_rows: 4, repeats: 3}, {path: b.jsonl, repeats: 0.5}]")) == found


def test_repeats_that_leave_nothing_are_refused(build: Build) -> None:
    assert refused(build, f"data.train=[{write('b.jsonl', 9)}, {{path: {write('a.jsonl', 5)}, repeats: 0.01}}]") == (
        "a.jsonl: of 5 documents repeats 0.01 leaves none; raise it, or take the source out"
    )


def test_weights_are_shares_of_the_rows(build: Build) -> None:
    write("a.jsonl", 90), write("b.jsonl", 20)
    data = build("data.train=[{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]")
    assert per_file(data) == {"a.jsonl": 60, "b.jsonl": 20}
    assert max(seen(data).values()) == 1


def test_a_weighted_source_without_documents_is_refused(build: Build) -> None:
    write("a.jsonl", 9)
    Path("e.jsonl").write_text('{"question": " ", "answer": "x"}\n')
    assert refused(build, "data.train=[{path: a.jsonl, weight: 1}, {path: e.jsonl, weight: 1}]") == (
        "e.jsonl: has a weight, and no document that is trained on; take it out"
    )


def test_a_cap_holds_for_held_out_rows_and_for_bad_ones_behind_it(build: Build) -> None:
    write("a.jsonl", 9, bad=1), write("e.jsonl", 7)
    data = build("data.train={path: a.jsonl, max_rows: 5}", "data.eval={path: e.jsonl, max_rows: 3}")
    assert [item.where for item in data.held_out_items] == [f"e.jsonl:{n}" for n in (1, 2, 3)]
    assert len(data.train.examples) == 5
    with pytest.raises(RecipeError) as caught:
        build("data.train=a.jsonl", "data.eval={path: e.jsonl, repeats: 2}")
    assert str(caught.value).endswith("data.eval: held-out rows are scored once; take repeats and weight out")


def test_places_follow_a_file_that_is_laid_out_anew(build: Build) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    for indent, places in ((None, {1}), (1, {2, 5})):
        Path("d.json").write_text(json.dumps(rows, indent=indent))
        assert {int(where.partition(":")[2]) for where in seen(build("data.train=d.json"))} == places


def test_white_space_around_a_turn_makes_no_other_row(build: Build) -> None:
    write("a.jsonl", 4)
    Path("e.jsonl").write_text('{"question": " a.jsonl 0? ", "answer": "Answer 0 of a.jsonl."}\n')
    assert refused(build, "data.train=a.jsonl", "data.eval=e.jsonl").startswith("data.eval: 1 held-out rows of 1 are")


def test_a_source_may_have_its_own_format_and_columns(build: Build) -> None:
    write("a.jsonl", 3)
    Path("c.csv").write_text("ask,say\nWhat?,That.\n")
    columns = "{prompt: '{ask}', completion: '{say}'}"
    data = build(f"data.train=[a.jsonl, {{path: c.csv, format: prompt_completion, columns: {columns}}}]")
    assert per_file(data) == {"a.jsonl": 3, "c.csv": 1}


def test_rows_of_weight_0_are_left_out_and_counted(build: Build) -> None:
    lines = [{"question": f"{n}?", "answer": f"{n}.", "w": n / 2} for n in range(4)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = build("data.train=a.jsonl", "data.columns={weight: '{w}'}")
    examples = data.train.examples
    assert [set(examples[row]["loss_weights"]) for row in range(len(examples))] == [{0.5}, {1.0}, {1.5}]
    assert data.train.stats.untrained == 1
    assert "in the loss a row weighs from 0.5 to 1.5" in data.train.stats.describe()
    scored = build("data.train=a.jsonl", "data.eval=a.jsonl", "eval.overlap=allow", "data.columns={weight: '{w}'}")
    assert scored.held_out is not None
    assert (scored.held_out.stats.documents, scored.held_out.examples.weighted) == (4, False), "each token once"
    plain = build("data.train=a.jsonl").train.examples
    assert not plain.weighted
    assert "loss_weights" not in plain[0]
    assert "one row (train.global_batch_size: 1)" in refused(
        build, "data.train=a.jsonl", "data.columns={weight: '{w}'}", "train={global_batch_size: 1, micro_batch_size: 1}"
    )


def test_other_weights_are_other_rows(build: Build) -> None:
    Path("a.csv").write_text("question,answer,w,v\na?,A.,1,2\nb?,B.,3,3\n")
    found = [build("data.train=a.csv", f"data.columns={{weight: '{{{w}}}'}}").train.examples for w in "wv"]
    assert found[0].fingerprint() != found[1].fingerprint()


def test_held_out_by_hash_over_all_sources(build: Build) -> None:
    write("a.jsonl", 60), write("b.jsonl", 60)
    data = build("data.train=[a.jsonl, {path: b.jsonl, repeats: 2}]", "data.eval_fraction=0.2")
    out = {item.where for item in data.held_out_items}
    found = seen(data)
    assert 10 < len(out) < 40
    assert {where.partition(":")[0] for where in out} == {"a.jsonl", "b.jsonl"}
    assert not out & found.keys()
    assert len(out) + len(found) == 120
    assert {found[where] for where in found if where.startswith("b")} == {2}
    assert data.eval_source == "20.0% of a.jsonl, b.jsonl"
    before = {item.where for item in build("data.train=a.jsonl", "data.eval_fraction=0.2").held_out_items}
    assert {where for where in out if where.startswith("a")} == before, "other rows move none"


def test_held_out_rows_that_are_trained_are_refused(build: Build) -> None:
    write("a.jsonl", 8)
    Path("e.jsonl").write_text("".join(Path("a.jsonl").read_text().splitlines(True)[:2]))
    assert refused(build, "data.train=a.jsonl", "data.eval=e.jsonl") == (
        "data.eval: 2 held-out rows of 2 are training rows too, and their scores would mean little; take them out of "
        "data.train, or set eval.overlap: allow"
    )
    assert build("data.train=a.jsonl", "data.eval=e.jsonl", "eval.overlap=allow").overlap == 2
    assert build("data.train={path: a.jsonl, max_rows: 1}", "data.eval=e.jsonl", "eval.overlap=allow").overlap == 1


def test_bad_rows_are_left_out_within_a_budget(build: Build) -> None:
    write("a.jsonl", 4000, bad=4), write("b.jsonl", 30, bad=1), write("c.jsonl", 30, bad=2)
    words = ("data.on_bad_row=skip", "data.max_seq_len=64")
    data = build("data.train=[a.jsonl, b.jsonl]", *words)
    assert list(data.skipped) == [(f"a.jsonl:{n}", "'question' is null, expected text") for n in range(4001, 4005)] + [
        ("b.jsonl:31", "'question' is null, expected text")
    ]
    assert sum(seen(data).values()) == 4030
    assert refused(build, "data.train=c.jsonl", *words).splitlines() == [
        "2 of 32 rows are bad, more than data.on_bad_row: skip leaves out (0.1%); mend them, or the format",
        "c.jsonl:31: 'question' is null, expected text",
        "c.jsonl:32: 'question' is null, expected text",
    ]
    assert refused(build, "data.train=b.jsonl") == "b.jsonl:31: 'question' is null, expected text"


def test_bad_held_out_rows_are_told_as_well(build: Build) -> None:
    write("a.jsonl", 5), write("e.jsonl", 3, bad=1)
    assert refused(build, "data.train=a.jsonl", "data.eval=e.jsonl") == "e.jsonl:4: 'question' is null, expected text"
    assert build("data.train=a.jsonl", "data.eval=e.jsonl", "data.on_bad_row=skip").skipped == [
        ("e.jsonl:4", "'question' is null, expected text")
    ]


def test_a_document_alone_is_parted_at_a_line(build: Build) -> None:
    Path("one.txt").write_text("".join(f"Line {n}.\n" for n in range(60)))
    data = build("data.train=one.txt", "data.eval_fraction=0.1")
    assert data.held_out_items[0].text.startswith("Line 5")  # type: ignore[union-attr]
    assert data.overlap == 0
    assert len(build("data.train={path: one.txt, repeats: 2}", "data.eval_fraction=0.1").train.examples) == 2 * len(
        data.train.examples
    )


# Folders


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_of_a_folder_with_splits_the_one_that_is_named_is_trained(build: Build, streaming: str) -> None:
    """As datasets 5.2.0 (data_files.py) tells splits by names; what is not read is told beside the format."""
    Path("clone").mkdir()
    write("clone/train.jsonl", 6, kind="text"), write("clone/test.jsonl", 3, kind="text")
    words = [f"data.streaming={streaming}", "train.max_steps=1"]
    for split, count in (("train", 6), ("test", 3)):
        data = build(f"data.train={{path: clone, split: {split}}}", *words)
        assert {one.rpartition("/")[2]: times for one, times in per_file(data).items()} == {f"{split}.jsonl": count}
        assert f"; split {split} (1 file); not read: " in data.train_format
        if data.streamed is not None:
            assert data.streamed.stream.sources[0].split == split
    assert build("data.train=clone", "data.eval={path: clone, split: test}", *words).overlap == 0


def test_only_the_files_that_are_read_are_inputs(build: Build) -> None:
    Path("clone").mkdir()
    write("clone/train.jsonl", 6), write("clone/test.jsonl", 3)
    recipe = load_recipe(ROOT / "recipes" / "sft_tiny.yaml", ["data.train=clone", "data.eval=null"]).recipe
    assert [name for name in inputs_of(recipe) if "clone" in name] == ["clone/train.jsonl"]


@pytest.mark.parametrize("name", ["data", "data/gemma-tiny", "./recipes"])
def test_a_folder_that_ships_with_the_project_is_not_taken_for_rows(build: Build, name: str) -> None:
    expected = f"{name}: no such folder here; paths count from the current directory"
    assert refused(build, f"data.train={name}") == expected
    assert refused(build, "data.train=data/canary.jsonl", f"data.eval={name}") == expected


def test_shipped_files_and_own_folders_are_found_as_before(build: Build) -> None:
    Path("data").mkdir()
    write("data/a.jsonl", 4)
    assert per_file(build("data.train=data")) == {"data/a.jsonl": 4}
    assert len(per_file(build(f"data.train={write('b.jsonl', 2)}", "data.eval=data/canary.jsonl"))) == 1
    assert build(f"data.train={Path('data').resolve()}").train.stats.rows == 4
    assert "the folder holds no file of rows" in refused(build, f"data.train={ROOT / 'data' / 'gemma-tiny'}")
