"""What a file of answers is not written over, beside or for: other work, files of other hands, rows that are too
long.
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_ft.errors import DataError, LockedError
from gemma_ft.infer.batch_file import BatchFile
from gemma_ft.infer.sampling import Sampling
from tests.infer.conftest import DRAWN, GREEDY, MODEL, ROWS, Work
from tests.infer.test_batch_file import answers, refused
from tests.infer.tiny_session import tiny_session


def test_a_second_writer_is_refused(work: Work) -> None:
    with Path("out.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        message = refused(lambda: work().run(tiny_session()), LockedError)
    assert message == "out.jsonl: another process is writing to it; wait for it to end"


AGAIN = "--overwrite starts again, another --output keeps both"


def test_other_work_is_refused(work: Work) -> None:
    work().run(tiny_session())
    before = Path("out.jsonl").read_bytes()
    other = replace(DRAWN, max_new_tokens=8, sampling=Sampling(temperature=0.5, seed=5))
    assert refused(lambda: work(other).file.look(overwrite=False)) == (
        f"out.jsonl: was made otherwise: --max-tokens was 14, now 8; --temperature was 1.0, now 0.5; {AGAIN}"
    )
    assert refused(lambda: work(model={"model": "m2"}).run(tiny_session())) == (
        f"out.jsonl: was made otherwise: the model was another; {AGAIN}"
    )
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    assert refused(lambda: work().run(tiny_session())) == (
        f"out.jsonl: was made otherwise: the rows were others; {AGAIN}"
    )
    assert Path("out.jsonl").read_bytes() == before
    work().run(tiny_session(), overwrite=True)
    assert [answer["id"] for answer in answers()] == [row["id"] for row in reversed(ROWS)]


def test_files_of_other_hands_are_refused(work: Work) -> None:
    path = Path("out.jsonl")
    path.write_text('{"mine": 1}\n')
    assert refused(lambda: work().run(tiny_session())) == f"out.jsonl:1: is not the answer to row 1; {AGAIN}"
    for text in ('{"index": 0}\n', '{"mine": "and no line end"}'):
        path.write_text(text)
        assert refused(lambda: work().run(tiny_session())) == (
            f"out.jsonl: exists, and no out.jsonl.settings.json says how it was made; {AGAIN}"
        )
        assert path.read_text() == text
    assert refused(lambda: work().run(tiny_session())) == (
        f"out.jsonl: exists, and no out.jsonl.settings.json says how it was made; {AGAIN}"
    )
    work().run(tiny_session(), overwrite=True)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1]]))
    assert refused(lambda: work().run(tiny_session())) == f"out.jsonl:2: is not the answer to row 2; {AGAIN}"
    path.write_text("".join([*lines, lines[0]]))
    assert refused(lambda: work().run(tiny_session())) == f"out.jsonl:8: is not the answer to row 8; {AGAIN}"


def test_places_that_cannot_be_written_are_refused(work: Work) -> None:
    made = work()
    made.file.path = Path("/dev/null")
    assert refused(lambda: made.file.look(overwrite=False)) == (
        "/dev/null: is not a file; name one that can be continued"
    )
    made.file.path = Path("nowhere/out.jsonl")
    assert refused(lambda: made.file.look(overwrite=False)) == (
        "nowhere/out.jsonl: there is no folder 'nowhere'; make it first"
    )
    assert refused(lambda: BatchFile("rows.jsonl", Path("rows.jsonl"), GREEDY, MODEL)) == (
        "rows.jsonl: is the file that is read; name another --output"
    )
    assert not Path("out.jsonl").exists()


def test_rows_too_long_for_the_model_are_named(work: Work) -> None:
    Path("rows.jsonl").write_text(json.dumps({"prompt": "one two three " * 2000}) + "\n" + json.dumps(ROWS[0]) + "\n")
    session = tiny_session()
    limit = session.engine.max_seq_len
    tokens = len(work()._requests(replace(session, engine=_Roomy()))[0].prompt_ids)
    assert refused(lambda: work().run(session), DataError) == (
        f"rows.jsonl:1: {tokens:,} tokens and 14 new ones (--max-tokens) are more than the {limit:,} of this model"
    )
    assert not Path("out.jsonl").exists()


class _Roomy:
    max_seq_len = 10**6


def test_a_settings_file_of_other_hands_is_kept(work: Work) -> None:
    """Unless --overwrite; the file that is read is kept in any case."""
    other = Path("out.jsonl.settings.json")
    other.write_text('{"mine": 1}')
    assert refused(lambda: work().run(tiny_session())) == (
        "out.jsonl.settings.json: exists, and is not ours; another --output leaves it alone"
    )
    assert other.read_text() == '{"mine": 1}'
    work().file.look(overwrite=True)
    other.write_text(json.dumps([{"prompt": "x"}]))
    assert refused(lambda: BatchFile(str(other), Path("out.jsonl"), GREEDY, MODEL)) == (
        "out.jsonl.settings.json: is the file that is read; name another --output"
    )


def test_a_settings_place_that_is_taken_leaves_nothing_behind(work: Work) -> None:
    Path("out.jsonl.settings.json").mkdir()
    line = "out.jsonl.settings.json: is not a file, and the settings go there; name another --output"
    assert refused(lambda: work().file.look(overwrite=True)) == line
    assert refused(lambda: work().run(tiny_session(), overwrite=True)) == line
    assert sorted(path.name for path in Path().iterdir()) == ["out.jsonl.settings.json", "rows.jsonl"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.settings.json"])
@pytest.mark.parametrize("there", [True, False])
def test_no_symbolic_link_is_followed(work: Work, name: str, there: bool) -> None:
    target = Path("target")
    if there:
        target.write_text("")
    Path(name).symlink_to(target)
    line = f"{name}: is a symbolic link, and none is followed; name another --output"
    assert refused(lambda: work().file.look(overwrite=True)) == line
    assert refused(lambda: work().run(tiny_session(), overwrite=True)) == line
    assert target.exists() == there
