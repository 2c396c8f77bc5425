"""docs/extending.md: each of its examples, followed in a copy of the project, does what the page says."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

from tests.extending_page import PAGE, ROOT, blocks, done, files_of, shown, told

EXAMPLES = ("size", "family", "format", "objective", "kernel", "verb")


def test_the_page_has_an_example_of_each_kind_and_no_block_besides() -> None:
    found = blocks()
    assert tuple(dict.fromkeys(block.example for block in found)) == EXAMPLES
    assert len(found) * 2 == PAGE.read_text(encoding="utf-8").count("\n```")
    heads = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert [head.split()[1] for head in heads] == list(EXAMPLES)


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.example}-{Path(block.path).stem}")
def test_a_block_is_python_for_a_file_of_the_package(block: object) -> None:
    code = textwrap.dedent(block.code)
    ast.parse(f"_ = {{\n{code}}}" if block.example == "size" else f"_ = (\n{code})" if code.endswith(",\n") else code)
    assert all(len(line) <= 120 for line in block.code.splitlines())
    assert (ROOT / block.path).is_file() if block.how else (ROOT / block.path).parent.is_dir()


def test_a_size_a_format_and_an_objective_take_one_file() -> None:
    assert {example: len(files_of(example)) for example in EXAMPLES} == {
        "size": 1, "family": 1, "format": 1, "objective": 1, "kernel": 2, "verb": 2}  # fmt: skip


FAMILY = """
import json
from gemma_ft.families.records import PRESETS, family_of, known_families
from gemma_ft.plan.shape import preset_shape
from gemma_ft.recipe.load import parse_recipe

family, name = family_of("gemma_long"), "gemma-long-1b"
recipe = parse_recipe({"output_dir": "r", "strategy": "full", "data": {"train": "a"}, "model": {"preset": name}})
print(json.dumps({
    "known": known_families("or"),
    "preset": recipe.model.preset,
    "windows": [kind.sliding_window for kind in family.layers(PRESETS[name].fields)][:6],
    "turns": family.chat.text().count("<|turn>") > 0 and "<start_of_turn>" not in family.chat.text(),
    "hidden": preset_shape(name).hidden,
}))
"""


@pytest.mark.slow
def test_the_family(tmp_path: Path) -> None:
    assert shown(done("family", tmp_path), FAMILY) == {
        "known": "Gemma 1, 2, 3, VaultGemma or Long",
        "preset": "gemma-long-1b",
        "windows": [4096, 4096, None, 4096, 4096, None],
        "turns": True,
        "hidden": 1024,
    }


OBJECTIVE = """
import json
import torch
from gemma_ft.train.objectives.registry import build_objective, objective_names
from gemma_ft.train.micro_batch import token_weights

objective, batch = build_objective("unlikely"), {"labels": torch.tensor([[5, 6, -100]])}
logprobs = torch.tensor([[0.0, 0.5, 0.0]]).log().clamp(min=-9)
value, weights = token_weights(objective, logprobs, batch, torch.ones(1))
print(json.dumps([objective_names(), objective.divisors(batch), float(value), weights.tolist()]))
"""


@pytest.mark.slow
def test_the_objective(tmp_path: Path) -> None:
    """-log(1 - 1/2) = log 2, with a weight of -p / (1 - p) = -1."""
    names, divisors, value, weights = shown(done("objective", tmp_path), OBJECTIVE)
    assert {"sft", "unlikely"} <= set(names)
    assert (divisors, value) == ([1.0], pytest.approx(0.693147, rel=1e-5))
    assert weights == [[0.0, pytest.approx(-1.0), 0.0]]


KERNEL = """
import json
import torch
from gemma_ft.kernels.backend import implementation_of
from gemma_ft.kernels.rotary import rotate, rotate_reference

torch.manual_seed(0)
x = torch.randn(2, 3, 5, 8, requires_grad=True)
angles = torch.randn(1, 1, 5, 4).repeat(1, 1, 1, 2)
grads, outs = [], []
for operation in (rotate, rotate_reference):
    out = operation(x, angles.cos(), angles.sin())
    grads.append(torch.autograd.grad(out.square().mul(torch.arange(8)).sum(), x)[0])
    outs.append(out.detach())
print(json.dumps({
    "chosen": implementation_of("rotary", x).module,
    "apart": max(float((a - b).abs().max()) for a, b in (outs, grads)),
}))
"""


@pytest.mark.slow
def test_the_kernel(tmp_path: Path) -> None:
    found = shown(done("kernel", tmp_path), KERNEL)
    assert found["chosen"] == "gemma_ft.kernels.complex_rotary"
    assert found["apart"] < 1e-4


@pytest.mark.slow
def test_the_verb(tmp_path: Path) -> None:
    root = done("verb", tmp_path)
    assert told(root, "-m", "gemma_ft", "parameters", "gemma-2-2b") == "gemma-2-2b: 2,614,341,888 parameters\n"
    assert "parameters" in told(root, "-m", "gemma_ft", "--help")
