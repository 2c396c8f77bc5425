"""What grows, grows in one file: the sizes and formats of docs/extending.md, followed in a copy of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.extending_page import done, shown

pytestmark = pytest.mark.slow  # a process for each

SHOW_SIZE = """
import json
import torch
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.ui.plan import model_plan, overview
from gemma_ft.plan.shape import preset_shape
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
    "plan": model_plan(preset_shape(name), None).splitlines()[1].split()[:2],
    "class": type(model).__name__,
    "parameters": [sum(weight.numel() for weight in model.parameters()), PRESETS[name].parameters],
    "windows": model.model.numerics.window_tokens,
}))
"""
SHOW_FORMAT = """
import contextlib
import io
import json
from pathlib import Path
from gemma_ft.cli.app import main
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


Path("rows.jsonl").write_text('{"riddle": "What has keys?", "solution": "A piano."}\\n' * 3)
Path("r.yaml").write_text("extends: sft_tiny\\noutput_dir: r\\ndata: {train: rows.jsonl, eval: null}\\n")
with contextlib.redirect_stdout(io.StringIO()) as page:
    code = main(["preview", "r.yaml", "--rows", "1"])
print(json.dumps({
    "recipe": refused("riddles"),
    "slip": refused("riddle"),
    "in the schema": json_schema()["$defs"]["Data"]["properties"]["format"]["enum"],
    "asked": [turn.content for turn in prompts_of([Row("a:1", {"riddle": "What has keys?"})])[0].turns],
    "preview": [code, "riddles: the rows have riddle, solution" in page.getvalue(),
                "A piano.<end_of_turn>" in page.getvalue()],
}))
"""


def test_a_size_takes_one_file(tmp_path: Path) -> None:
    assert shown(done("size", tmp_path), SHOW_SIZE) == {
        "preset": "gemma-2-made-up",
        "in the schema": True,
        "in the overview": True,
        "plan": ["gemma-2-made-up", "bf16"],
        "class": "Gemma2ForCausalLM",
        "parameters": [3_208_448, 3_208_448],
        "windows": [128, None, 128],
    }


def test_a_format_takes_one_file(tmp_path: Path) -> None:
    """Its name in recipes, and rows of it that are detected, encoded, shown and asked."""
    known = ["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "riddles"]
    assert shown(done("format", tmp_path), SHOW_FORMAT) == {
        "recipe": "riddles",
        "slip": f"recipe: data.format: expected one of {', '.join(known)}, got 'riddle'; did you mean 'riddles'?",
        "in the schema": known,
        "asked": ["What has keys?"],
        "preview": [0, True, True],
    }
