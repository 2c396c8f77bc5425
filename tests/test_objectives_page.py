"""docs/objectives.md: the rows of each objective are read by the product, as they stand there; every setting has its
line with its default; and what a run prints is what the page says.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import trl

from gemma_ft.build.data import build_data
from gemma_ft.build.inputs import build_tokenizer
from gemma_ft.evaluate.judge import judge_of
from gemma_ft.recipe.load import load_recipe
from gemma_ft.recipe.objectives import KINDS, WORDS, train_defaults
from gemma_ft.recipe.schema import Train
from gemma_ft.system.shipped import shipped_root
from gemma_ft.train.falling import STEPS
from gemma_ft.train.objectives.registry import objective_names
from gemma_ft.train.zero_proof import ZeroProof

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
OWN = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAGE, re.M | re.S))
SHARED = PAGE.split("\n## The reference\n")[1]
WHOLE = {"sft": "sft_tiny", "reward": "reward_tiny"}


def block(kind: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", OWN[kind], re.M | re.S)
    return str(found)


def as_written(default: Any) -> str:
    return "not set" if default is None else str(default).lower()


def test_every_objective_has_its_section() -> None:
    assert sorted(OWN) == objective_names()
    assert list(OWN) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_its_five_lines_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to the file that its recipe names, and read as a run reads them."""
    lines, recipe = block(kind, "json").splitlines(), block(kind, "yaml")
    assert len([json.loads(line) for line in lines]) == 5
    (name,) = re.findall(r"train: (\w+\.jsonl)", recipe)
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(f"extends: {WHOLE.get(kind, 'dpo_tiny')}\n{recipe}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / "cache"))
    weights = f"model.weights={shipped_root() / 'data' / 'gemma-tiny'}"
    loaded = load_recipe("mine.yaml", ["data.eval=null", weights]).recipe
    assert loaded.objective.kind == kind
    found = build_data(loaded, build_tokenizer(loaded))
    several = sum(isinstance(json.loads(line).get("rejected"), list) for line in lines if kind == "orpo")
    assert found.stats.rows == 5 + several
    assert found.skipped == []
    assert found.stats.warnings() == []
    assert len(found.examples) == found.stats.rows or loaded.data.packing
    sides = {"answers": 1, "labelled": 1, "pairs": 2}[loaded.objective.rows]
    assert found.stats.terminators == sides * found.stats.rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_stands_with_its_default(kind: str) -> None:
    fields = {name: field.default for name, field in KINDS[kind].model_fields.items() if name != "kind"}
    for name in {"dropout", "judge", "reference"} & set(fields):
        assert f"`objective.{name}`" in SHARED
    for name in set(fields) - {"dropout", "judge", "reference"}:
        assert f"`{name}` ({as_written(fields[name])})" in OWN[kind], name
    listed = set(re.findall(r"^- `(\w+)` \(", OWN[kind], re.M)) | set(re.findall(r", `(\w+)` \(not set\)", OWN[kind]))
    assert listed == set(fields) - {"dropout", "judge", "reference"}


def test_the_references_are_those_of_a_recipe() -> None:
    table = SHARED.split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \| ", table, re.M)[1:]) == WORDS


def test_the_table_has_the_rows_and_defaults_of_each_kind() -> None:
    table = re.findall(r"^\| \[(\w+)\]\(#\w+\) \| (\w+) \| ([\w ]+) \| ([\d.e-]+), ([\d.e-]+) \|", PAGE, re.M)
    assert [row[0] for row in table] == list(KINDS)
    for kind, rows, compared, adapter, full in table:
        section = KINDS[kind]
        assert (rows, compared) == (section.rows, "a reference" if section.needs_reference else "nothing")
        for told, strategy in ((adapter, "lora"), (full, "full")):
            rate = train_defaults(kind, strategy).get("learning_rate", Train().learning_rate)
            assert float(told) == rate, kind
    shared = {key: value for key, value in train_defaults("dpo", "lora").items() if key != "learning_rate"}
    assert all(f"`{key}: {value:g}`" in PAGE for key, value in shared.items())


def test_the_lines_of_a_run_are_those_that_it_prints(tmp_path: Path) -> None:
    proof = ZeroProof(loss=math.log(2), expected=math.log(2), answers=16, largest_difference=0.0, allowed=0.0)
    assert f"\n  start      {proof.told(scores=False)}\n" in PAGE
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    encoder: Any = None
    judge = judge_of(f"{tmp_path / 'mine.py'}:shorter", encoder, batch_size=1)
    assert judge.scores([], []) == []


def test_after_how_many_steps_falling_answers_are_told() -> None:
    assert f"clear over {STEPS} steps" in PAGE


def test_what_is_said_of_trl_is_of_the_version_that_is_tested() -> None:
    assert f"TRL {trl.__version__}'s own trainers" in " ".join(PAGE.split())


def test_security_says_who_runs_a_judge() -> None:
    page = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    for said in ("`objective.judge: FILE.py:function`", "`gemma-ft train` executes that file", "SHA-256",
                 "`--resume` refuses another file before anything of it is executed"):  # fmt: skip
        assert said in page
