"""A file of answers: whole lines in order, the same however the work was cut, refused where it is other work."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_ft.build.place import place_of
from gemma_ft.errors import DiskError, InterruptedWork, UserError
from gemma_ft.infer.answers import texts_in_order
from gemma_ft.infer.batch_file import identity_of, loading_of
from gemma_ft.infer.engine import Request
from tests.infer.conftest import DRAWN, GREEDY, ROWS, Work
from tests.infer.tiny_session import TINY, save_loud_adapter, tiny_session
from tests.observed import Observed


def answers() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def refused(action: Callable[[], object], kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    return str(caught.value)


def test_every_row_with_its_answer_in_order(work: Work) -> None:
    """What stands in the file is what each row gets when it is asked alone, with its own seed."""
    seen: list[int] = []
    observer = Observed(lambda figures: seen.append(figures["tokens"]))
    assert work().run(tiny_session(), observer=observer) == len(ROWS)
    assert observer.jobs == [("answers", len(ROWS), 0)]
    session, found = tiny_session(), answers()
    for number, (row, answer) in enumerate(zip(ROWS, found, strict=True)):
        assert list(answer) == ["id", "prompt", "output", "finish", "index"]
        assert {name: answer[name] for name in row} == row
        assert answer["index"] == number
    for answer, request in zip(found, work()._requests(session), strict=True):
        alone = session.stream(request.prompt_ids, max_new_tokens=DRAWN.max_new_tokens, sampling=request.sampling)
        assert answer["output"] == "".join(alone)
    assert len({answer["output"] for answer in found}) > 3
    assert len({len(answer["output"]) for answer in found}) > 3
    assert len(seen) == len(ROWS)
    assert min(seen) < max(seen) <= 14


@pytest.mark.parametrize("kept", [0, 1, 3, len(ROWS) - 1])
def test_cut_anywhere_it_goes_on_to_the_same_bytes(work: Work, kept: int) -> None:
    work().run(tiny_session())
    path = Path("out.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:-1])  # the last line lacks no more than its end
    observer = Observed()
    again = work()
    again.file.look(overwrite=False)
    assert again.file.done == kept
    again.run(tiny_session(), observer=observer)
    assert path.read_bytes() == whole
    assert observer.jobs == [("answers", len(ROWS), kept)]
    assert observer.counts == [1] * (len(ROWS) - kept)


def test_how_many_at_once_changes_nothing(work: Work) -> None:
    work().run(tiny_session())
    before = answers()
    session = tiny_session()
    alone = type(session.engine)(session.model, stop_ids=session.encoder.stop_ids, max_batch=1)
    work().run(replace(session, engine=alone), overwrite=True)
    assert answers() == before


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(work: Work) -> None:
    work().run(tiny_session())
    whole = answers()

    def interrupt(figures: object) -> None:
        if first.file.done == 3:
            raise KeyboardInterrupt

    first = work()
    message = refused(lambda: first.run(tiny_session(), overwrite=True, observer=Observed(interrupt)), InterruptedWork)
    assert message == (
        "out.jsonl: stopped with 3 of 7 answers; the same command goes on from there, without --overwrite"
    )
    assert InterruptedWork.exit_code == 130
    assert answers() == whole[:3]
    assert tiny_session().engine.active == tiny_session().engine.waiting == 0
    work().run(tiny_session())
    assert answers() == whole


def test_a_full_disk_leaves_whole_lines(work: Work) -> None:
    work().run(tiny_session())
    whole = Path("out.jsonl").read_bytes()
    room = whole.index(b'"index": 2') + 3  # inside the third line
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    begun = work()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        message = refused(lambda: begun.run(tiny_session(), overwrite=True), DiskError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == (
        "out.jsonl: cannot be written: File too large; 2 of 7 answers are in it, the same command goes on from there"
    )
    assert Path("out.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    work().run(tiny_session())
    assert Path("out.jsonl").read_bytes() == whole


def test_fields_of_the_rows_are_never_lost(work: Work) -> None:
    """Ours give way to the rows' own; what JSON can hold stays as it was."""
    row = {"instruction": "Say it.", "output": "It.", "index": 7, "index_": None, "cut": "\ud83d", "line": "\u2028"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    made = work(GREEDY)
    assert made.notes == [
        "the rows have a field 'output'; ours is 'output_'",
        "the rows have a field 'index'; ours is 'index__'",
    ]
    made.run(tiny_session())
    (answer,) = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert {name: answer[name] for name in row} == row
    assert sorted(set(answer) - set(row)) == ["finish", "index__", "output_"]
    again = work(GREEDY)
    again.file.look(overwrite=False)
    assert again.file.done == 1


def test_why_an_answer_ended_and_stop_texts(work: Work) -> None:
    work(replace(GREEDY, max_new_tokens=60, stop=(".",))).run(tiny_session())
    found = answers()
    assert {answer["finish"] for answer in found} == {"stop"}
    assert not any("." in answer["output"] for answer in found)
    assert tiny_session().engine.active == 0  # nobody goes on behind a stop text
    work(replace(GREEDY, max_new_tokens=2)).run(tiny_session(), overwrite=True)
    assert {answer["finish"] for answer in answers()} == {"length"}


def test_a_slow_row_holds_back_no_more_than_it_may() -> None:
    """Others are answered meanwhile, but not all that come after it."""
    session = tiny_session()
    endless = type(session.engine)(session.model, stop_ids=[], max_batch=3)
    ids = session.completion_ids("The cook and the owl")
    requests = [Request(ids, 40), *[Request(ids, 1) for _ in range(30)]]
    begun: list[int] = []

    class Watched:
        """The engine, noting what is begun before the first answer is given."""

        def __init__(self) -> None:
            self.max_batch, self.step, self.cancel = endless.max_batch, endless.step, endless.cancel

        def submit(self, request: Request) -> int:
            begun.append(request.max_new_tokens)
            return endless.submit(request)

    texts = texts_in_order(replace(session, engine=Watched()), requests, ahead=10)  # type: ignore[arg-type]
    first = next(texts)
    assert (first.tokens, len(begun)) == (40, 10)
    assert [text.tokens for text in texts] == [1] * 30
    assert endless.active == 0


def test_a_model_is_known_wherever_it_lies(tmp_path: Path) -> None:
    adapter = save_loud_adapter(tmp_path / "adapter")
    base, tuned = identity_of(place_of(TINY)), identity_of(place_of(adapter))
    assert base != tuned
    assert identity_of(place_of(TINY, adapter)) == tuned
    moved = adapter.rename(tmp_path / "moved")
    assert identity_of(place_of(moved)) == tuned
    config = moved / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 64', '"lora_alpha": 32'))
    assert identity_of(place_of(moved)) != tuned


def test_options_left_out_are_those_spelled_out(tmp_path: Path) -> None:
    """As it was trained; bf16 where nothing says; an adapter's base is not quantized where it says none."""
    place = place_of(TINY)
    assert loading_of(place, dtype=None, quantize="auto") == loading_of(place, dtype="bf16", quantize="none")
    contract: Any = SimpleNamespace(quantize="nf4", precision="float32")
    trained = replace(place, adapter=tmp_path, contract=contract)
    assert loading_of(trained, dtype=None, quantize="auto") == {"dtype": "float32", "quantize": "nf4"}
    merged = replace(trained, adapter=None)
    assert loading_of(merged, dtype="bf16", quantize="auto") == {"dtype": "bf16", "quantize": "none"}
