"""Runs of the tiny recipe on the device: as on the CPU, whatever is evaluated, cut or resumed; float16 nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.build.inputs import build_tokenizer
from gemma_ft.build.model import build_model
from gemma_ft.build.pretrained import load_model
from gemma_ft.errors import UserError
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.recipe.load import LoadedRecipe
from tests.cuda.conftest import CUDA, DEVICE, ROOT, metrics, same
from tests.parity.amplified import relative, token_rows
from tests.train.test_resume import Killed, kill_after

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
ARMS = {"qlora": ["strategy=qlora"]}
if CUDA:  # on a CPU, which has nothing to compare with, one arm proves the tests
    ARMS |= {"lora": ["strategy=lora"], "bf16": ["strategy=qlora", "train.precision=bf16"]}
# Of losses. In 4 bits some weights lie between two values, of which each device may take another.
NEAR_THE_CPU = {"lora": 1e-4, "qlora": 1e-2, "bf16": 2e-2} if CUDA else dict.fromkeys(ARMS, 0.0)
STEADY = 1e-4 if CUDA else 0.0  # of losses, between two runs on this device
BY_THEMSELVES = """
import sys
from gemma_ft.recipe.load import load_recipe
from gemma_ft.train.run import train_recipe
for path in sys.argv[1:]:
    assert train_recipe(load_recipe(path, [])) == 0
"""


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def adapter(loaded: LoadedRecipe) -> dict[str, Tensor]:
    return load_file(str(Path(loaded.recipe.output_dir) / "adapter" / "adapter_model.safetensors"))


def test_losses_are_those_of_a_cpu(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    """Another process, which sees no GPU, trains the recipes anew; where this one sees none either, to the bit."""
    recipes, found, there = [], {}, {}
    for arm, overrides in ARMS.items():
        loaded = recipe_for(*overrides, out=arm)
        found[arm] = losses(train(loaded))
        there[arm] = recipe_for(*overrides, out=f"{arm}-cpu")
        recipes.append(str(written(there[arm], tmp_path / f"{arm}.yaml")))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    told = subprocess.run([sys.executable, "-c", BY_THEMSELVES, *recipes], cwd=ROOT, env=environment, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert told.returncode == 0, told.stderr
    for arm, loaded in there.items():
        assert found[arm] == pytest.approx(losses(metrics(loaded)), rel=NEAR_THE_CPU[arm], abs=0)


def written(loaded: LoadedRecipe, path: Path) -> Path:
    path.write_text(loaded.recipe.model_dump_json(), encoding="utf-8")  # JSON is YAML
    return path


@pytest.mark.parametrize("arm", ["qlora", "lora"] if CUDA else ["qlora"])
def test_an_evaluation_on_the_way_changes_nothing(arm: str, recipe_for: RecipeFor, train: Train) -> None:
    """Neither the held-out loss nor answers, after which bitsandbytes may give no gradient and dropout draw others."""
    shared = [*ARMS[arm], "adapter.dropout=0.1"]
    watched = [
        "data.eval=data/scheduling_eval.jsonl", "eval.every_steps=1", "eval.max_rows=3", "eval.generate_rows=2",
        "eval.samples=2", "eval.max_new_tokens=5", "eval.batch_size=2",
    ]  # fmt: skip
    plain, evaluated = recipe_for(*shared, out="plain"), recipe_for(*shared, *watched, out="evaluated")
    expected = losses(train(plain))
    assert losses(train(evaluated)) == pytest.approx(expected, rel=STEADY, abs=0)
    assert same(adapter(evaluated), adapter(plain), 1e-2)


@pytest.mark.parametrize("arm", ["qlora", "lora"] if CUDA else ["qlora"])
def test_a_resumed_run_goes_on_as_it_would_have(
    arm: str, recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [*ARMS[arm], "adapter.dropout=0.1", "checkpoint.every_steps=2"]
    whole, broken = recipe_for(*shared, out="whole"), recipe_for(*shared, out="broken")
    expected = losses(train(whole))
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        train(broken)
    before = Path(broken.recipe.output_dir) / "checkpoints" / "step-00000002"
    assert before.is_dir()
    assert losses(train(broken, resume=True)) == pytest.approx(expected, rel=STEADY, abs=0)
    assert same(adapter(broken), adapter(whole), 1e-2)


def test_fault_27_the_cut_into_micro_batches_changes_nothing(recipe_for: RecipeFor, train: Train) -> None:
    cuts = [
        losses(train(recipe_for("strategy=lora", f"train.micro_batch_size={size}", out=f"by{size}"))) for size in (4, 1)
    ]
    assert cuts[0] == pytest.approx(cuts[1], rel=1e-4 if CUDA else 1e-5)


# Fault 20


def test_float16_is_refused(recipe_for: RecipeFor) -> None:
    with pytest.raises(UserError) as raised:
        recipe_for("train.precision=float16")
    assert "train.precision: 'float16' overflows in Gemma, whose activations pass 65504; use bf16 or float32" in str(
        raised.value
    )
    with pytest.raises(UserError) as raised:
        load_model(ROOT / "data" / "gemma-tiny", dtype=torch.float16, device=DEVICE)
    assert str(raised.value) == (
        "dtype: float16 overflows in Gemma, whose activations pass 65504; use bfloat16 or float32"
    )


@pytest.fixture
def halved(tmp_path: Path) -> Path:
    """The tiny Gemma, stored in float16."""
    folder, base = tmp_path / "halved", ROOT / "data" / "gemma-tiny"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = {name: one.half() for name, one in load_file(str(base / "model.safetensors")).items()}
    save_file(weights, str(folder / "model.safetensors"), {"format": "pt"})
    config = (folder / "config.json").read_text()
    assert '"bfloat16"' in config
    (folder / "config.json").write_text(config.replace('"bfloat16"', '"float16"'))
    return folder


def test_a_folder_in_float16_is_loaded_in_a_dtype_that_was_asked_for(halved: Path) -> None:
    told = "stored in float16, which overflows in Gemma, whose activations pass 65504; pass dtype=torch.bfloat16"
    for options in ({}, {"dtype": "auto"}):
        with pytest.raises(UserError) as raised:
            GemmaForCausalLM.from_pretrained(halved, **options)
        assert str(raised.value) == f"{halved}: {told}"
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert GemmaForCausalLM.from_pretrained(halved, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("strategy", ["lora", "qlora", "full"])
def test_what_is_stored_in_float16_is_not_computed_in_it(
    strategy: str, precision: str, recipe_for: RecipeFor, halved: Path
) -> None:
    recipe = recipe_for(f"strategy={strategy}", f"train.precision={precision}", f"model.weights={halved}").recipe
    model, _ = build_model(recipe, build_tokenizer(recipe))
    dtypes = {one.dtype for one in model.parameters()}
    layers = [one for one in model.modules() if isinstance(one, Linear4bit)]
    assert bool(layers) == (strategy == "qlora")
    dtypes |= {dtype for one in layers for dtype in (one.compute_dtype, one.weight.quant_state.dtype)}
    assert dtypes <= {torch.float32, torch.bfloat16}
    model.train()
    ids = token_rows(2, 30).to(DEVICE)
    seen: set[torch.dtype] = set()
    for module in model.modules():  # a linear layer with a hook would be left to PEFT
        if type(module).__module__ == "gemma_ft.model.layers":
            module.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert seen
    assert torch.float16 not in seen
    if strategy != "qlora" and precision == "float32":  # its numbers are kept
        own = load_model(ROOT / "data" / "gemma-tiny", dtype=torch.float32, device=DEVICE)
        assert relative(loss, own(ids, labels=ids).loss) <= 1e-4
