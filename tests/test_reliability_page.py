"""docs/reliability.md says what benchmarks/results/faults.json holds."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))["figures"]


def test_the_table_is_the_result_files() -> None:
    random, changes = RESULT["test_killed_at_random_moments"], RESULT["test_killed_at_any_change_of_a_file"]
    damage = RESULT["test_any_damage_to_a_checkpoint_is_seen"]
    adapter = RESULT["test_any_damage_to_an_adapter_is_refused"]
    one, two = (RESULT[f"test_a_signal_loses_no_step[{ranks}]"] for ranks in (1, 2))
    sizes, writes = RESULT["test_files_that_cannot_grow"], RESULT["test_no_space_at_any_write"]
    lost = [value for name, value in RESULT.items() if name.startswith("test_the_job_ends_and_says_why")]
    evil = RESULT["test_nothing_that_lies_in_a_file_is_run"]
    rows = [
        f"| SIGKILL at random moments | {random['killed']:,} | {random['failed_resumes']} failed resumes |",
        f"| SIGKILL at each change of a file | {changes['killed']} | {changes['failed_resumes']} failed resumes |",
        f"| a checkpoint's files missing, empty, cut, flipped | {damage['damages']} | {damage['unseen']} unseen |",
        f"| an adapter's files, likewise | {adapter['damages']} | {adapter['unseen']} unseen |",
        f"| a signal on one rank | {one['stopped']} | {one['steps_lost']} steps lost |",
        f"| a signal on two ranks | {two['stopped']} | {two['steps_lost']} steps lost |",
        f"| no space at each write | {writes['writes']} | {writes['failed_resumes']} failed resumes |",
        f"| files that cannot grow | {sizes['sizes']} | {sizes['failed_resumes']} failed resumes |",
        f"| one of two ranks killed, stopped, raising | {len(lost)} | {sum(one['hang'] for one in lost)} hangs |",
        f"| malicious files | {evil['total']} | {evil['executions']} executions |",
    ]
    for row in rows:
        assert row in PAGE, row
    assert max(one["seconds"] for one in lost) < 60
    assert random["killed"] + changes["killed"] >= 1000


def test_the_fuzzed_cases_are_the_result_files() -> None:
    for what in ("rows", "recipes", "artefacts", "requests"):
        found = RESULT[f"test_spoiled_{what}"]
        row = f"| spoiled {what} | {found['cases']:,} | {found['tracebacks']} tracebacks, {found['hangs']} hangs |"
        assert row in PAGE, row
        assert found["cases"] >= 10_000
