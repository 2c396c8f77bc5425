"""What grows, grows in one file: each worked example of docs/extending.md is done in a copy of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gemma_ft

SIZE = """\
        "gemma-2-made-up": _gemma2(
            "me/gemma-2-made-up", 3_208_448, D=256, F=1024, layers=3, N=4, K=2, H=64, query_pre_attn_scalar=64,
            vocab_size=1000, sliding_window=128,
        ),
"""
SHOW_SIZE = """
import json
import torch
from gemma_ft.families import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.ui.plan import overview, preset_plan
from gemma_ft.recipe.json_schema import json_schema
from gemma_ft.recipe.load import parse_recipe

name = "gemma-2-made-up"
recipe = parse_recipe({"output_dir": "r", "strategy": "full", "data": {"train": "a"}, "model": {"preset": name}})
with torch.device("meta"):
    model = GemmaForCausalLM(PRESETS[name].config())
print(json.dumps({
    "preset": recipe.model.preset,
    "in the schema": name in json_schema()["$defs"]["Model"]["properties"]["preset"]["enum"],
    "in the overview": name in overview(),
    "plan": preset_plan(name, None).splitlines()[1].split()[:2],
    "class": type(model).__name__,
    "parameters": [sum(weight.numel() for weight in model.parameters()), PRESETS[name].parameters],
    "windows": model.model.numerics.window_tokens,
}))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, in a folder of its own."""
    source = Path(gemma_ft.__file__).parent
    shutil.copytree(source, tmp_path / "gemma_ft", ignore=shutil.ignore_patterns("__pycache__", "_shipped"))
    for name in ("recipes", "data"):
        shutil.copytree(source.parent / name, tmp_path / name)
    return tmp_path / "gemma_ft"


def shown(package: Path, script: str) -> Any:
    """What a script prints as JSON in another process, which imports the copy."""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=package.parent, env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def insert(path: Path, text: str, *, before: str) -> None:
    """Put lines into a file, before the one line that begins so."""
    whole = path.read_text(encoding="utf-8")
    assert whole.count(before) == 1
    path.write_text(whole.replace(before, text + before), encoding="utf-8")


def test_a_size_takes_one_file(package: Path) -> None:
    insert(package / "families.py", SIZE, before='        "gemma-2-9b": ')
    assert shown(package, SHOW_SIZE) == {
        "preset": "gemma-2-made-up",
        "in the schema": True,
        "in the overview": True,
        "plan": ["gemma-2-made-up", "bf16"],
        "class": "Gemma2ForCausalLM",
        "parameters": [3_208_448, 3_208_448],
        "windows": [128, None, 128],
    }


FORMAT = '''\
"""riddle, solution: texts."""

from __future__ import annotations

from gemma_ft.data.read.fields import Fields
from gemma_ft.data.conversation import Item, Turn
from gemma_ft.data.read.row_format import Columns, Format, conversation, text_in


def parse(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """One conversation."""
    turns = [Turn("user", text_in(fields, "riddle")), Turn("assistant", text_in(fields, "solution"))]
    return [conversation(where, turns)]


FORMAT = Format(
    readings=lambda row: ["riddle, solution"] if "riddle" in row and "solution" in row else [],
    parse=parse,
    answer_field=lambda row: "solution" if "riddle" in row else None,
)
'''
SHOW_FORMAT = """
import json
from pathlib import Path
from gemma_ft.data.read.sources import Row
from gemma_ft.errors import UserError
from gemma_ft.infer.prompts import prompts_of
from gemma_ft.recipe.json_schema import json_schema
from gemma_ft.recipe.load import parse_recipe


def refused(format):
    try:
        return parse_recipe(recipe(format)).data.format
    except UserError as error:
        return str(error)


def recipe(format):
    return {"output_dir": "r", "strategy": "full", "data": {"train": "a", "format": format},
            "model": {"preset": "gemma-2b"}}


print(json.dumps({
    "recipe": refused("riddles"),
    "slip": refused("riddle"),
    "in the schema": json_schema()["$defs"]["Data"]["properties"]["format"]["enum"],
    "asked": [turn.content for turn in prompts_of([Row("a:1", {"riddle": "What has keys?"})])[0].turns],
}))
"""


def test_a_format_takes_one_file(package: Path) -> None:
    (package / "data" / "formats" / "riddles.py").write_text(FORMAT, encoding="utf-8")
    known = ["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "riddles"]
    assert shown(package, SHOW_FORMAT) == {
        "recipe": "riddles",
        "slip": f"recipe: data.format: expected one of {', '.join(known)}, got 'riddle'; did you mean 'riddles'?",
        "in the schema": known,
        "asked": ["What has keys?"],
    }


def test_rows_of_a_new_format_are_detected_and_encoded(package: Path) -> None:
    """As `gemma-ft preview` shows them, from a file."""
    (package / "data" / "formats" / "riddles.py").write_text(FORMAT, encoding="utf-8")
    rows = package.parent / "rows.jsonl"
    rows.write_text('{"riddle": "What has keys?", "solution": "A piano."}\n' * 3, encoding="utf-8")
    recipe = package.parent / "r.yaml"
    recipe.write_text(f"extends: sft_tiny\noutput_dir: r\ndata: {{train: {rows}, eval: null}}\n", encoding="utf-8")
    command = [sys.executable, "-m", "gemma_ft", "preview", str(recipe), "--rows", "1"]
    run = subprocess.run(
        command, cwd=package.parent, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(package.parent), "GEMMA_FT_CACHE": str(package.parent / "cache")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "riddles: the rows have riddle, solution" in run.stdout
    assert "A piano.<end_of_turn>" in run.stdout
