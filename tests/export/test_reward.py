"""A reward model's adapter and what is made of it: its head is saved, merged, opened by others, and never lost."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from gemma_ft.adapters.lora import add_adapter
from gemma_ft.build.located import Source
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_base, load_model
from gemma_ft.build.text_weights import model_weights
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export.export import ExportOptions, export_model
from gemma_ft.export.merge.certified import merge_model
from gemma_ft.families.records import FAMILIES
from gemma_ft.model.reward import GemmaForSequenceClassification
from gemma_ft.ui.export import export_and_show
from tests.export.tuned import TINY, save_base
from tests.parity.amplified import FIRST, SECOND, THIRD, relative
from tests.reward import SCORE, SETTINGS, save_reward_adapter

STOCK = pytest.mark.parametrize("shape", [FIRST, SECOND, THIRD])


def batch(side: str = "right") -> dict[str, Tensor]:
    """Three sequences of several lengths with the padding at one side."""
    rows = [
        torch.randint(10, 200, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 21, 11)
    ]
    gaps = [torch.zeros(21 - len(row), dtype=torch.int64) for row in rows]
    ordered = [(row, gap) if side == "right" else (gap, row) for row, gap in zip(rows, gaps, strict=True)]
    ids = torch.stack([torch.cat(two) for two in ordered])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def rewards(model: Any, side: str = "right") -> Tensor:
    found: Tensor = model.eval()(**batch(side)).logits[:, 0].float()
    return found


def test_a_fresh_adapter_trains_the_head_and_gives_zero(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", SECOND)
    model = load_base(Source(str(base), None), dtype=torch.bfloat16, reward=True)
    wrapped = add_adapter(model, base=str(base), reward=True, **SETTINGS)
    assert rewards(wrapped).tolist() == [0.0, 0.0, 0.0]
    trained = {name for name, one in wrapped.named_parameters() if one.requires_grad}
    assert "base_model.model.score.modules_to_save.default.weight" in trained
    assert not any("lora" in name and "score" in name for name in trained), "no adapter is put on the head"
    assert {one.dtype for one in wrapped.parameters() if one.requires_grad} == {torch.float32}
    batch_ids = batch()
    wrapped(**batch_ids, answer_ids=torch.where(batch_ids["attention_mask"] > 0, torch.arange(3)[:, None], -1)).logits[
        0
    ].sum().backward()
    head = wrapped.get_base_model().score.modules_to_save["default"].weight
    assert bool(head.grad.any())


@pytest.mark.parametrize("side", ["left", "right"])
@STOCK
def test_peft_reopens_the_adapter_with_its_head_on_transformers_class(shape: str, side: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shape)
    folder = save_reward_adapter(tmp_path / "adapter", base)
    said = json.loads((folder / "adapter_config.json").read_text())
    assert (said["task_type"], said["modules_to_save"]) == ("SEQ_CLS", ["score"])
    ours = load_model(folder, dtype=torch.float32)
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(stock, str(folder))
    found = rewards(theirs, side)
    assert float(found.std()) > 1e-2
    assert relative(found, rewards(ours)) <= 1e-5
    assert relative(rewards(ours, "left"), rewards(ours)) <= 1e-5


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_head_is_not_quantized_and_comes_back(quantize: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", SECOND)
    folder = save_reward_adapter(tmp_path / "adapter", base, quantize=quantize)
    model = load_model(folder, dtype=torch.float32, quantize="auto")
    head = model.get_base_model().score.modules_to_save["default"].weight
    assert head.dtype == torch.float32
    assert torch.equal(head, place_of(folder).of_adapter.weights.tensor(SCORE))  # type: ignore[union-attr]
    assert relative(rewards(load_model(folder, dtype=torch.float32)), rewards(model)) > 1e-4, "nothing was quantized"


@pytest.mark.parametrize("side", ["left", "right"])
@STOCK
def test_a_merge_keeps_the_head_and_transformers_opens_it(shape: str, side: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shape)
    folder = save_reward_adapter(tmp_path / "adapter", base)
    facts = merge_model(str(folder), tmp_path / "merged", prompts=4)
    assert facts.certificate is not None
    assert facts.certificate["limit"]["measure"] == "relative_dreward"
    assert facts.certificate["passed"]
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    family = FAMILIES[said["model_type"]]
    assert (said["architectures"], said["pad_token_id"]) == ([family.classifier], 0)
    assert not (tmp_path / "merged" / "generation_config.json").exists()
    live = rewards(load_model(folder, dtype=torch.float32))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert relative(rewards(stock, side), live) <= 1e-5
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert isinstance(merged, GemmaForSequenceClassification)
    assert relative(rewards(merged), live) <= 1e-5


def test_a_merge_in_bf16_keeps_the_head_in_float32_and_is_certified(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", SECOND, dtype=torch.bfloat16)
    folder = save_reward_adapter(tmp_path / "adapter", base, quantize="nf4", precision="bf16")
    facts = merge_model(str(folder), tmp_path / "merged", prompts=4)
    assert facts.certificate is not None
    assert set(facts.certificate["compared"]) == {"dequantized", "base"}
    files = model_weights(tmp_path / "merged")
    adapter = place_of(folder).of_adapter
    assert adapter is not None
    assert torch.equal(files.tensor("score.weight"), adapter.weights.tensor(SCORE))
    assert {files.info(name).dtype for name in files.names if name != "score.weight"} == {torch.bfloat16}


def test_a_dry_run_of_a_merge_on_the_way_out_counts_the_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", SECOND, dtype=torch.bfloat16)
    folder = save_reward_adapter(tmp_path / "adapter", base, precision="bf16")
    sink = StringIO()
    options = ExportOptions("hf", tmp_path / "out")
    export_and_show(str(folder), options, dry_run=True, console=Console(file=sink, width=200))
    planned = [line.split()[-1] for line in sink.getvalue().splitlines() if line.startswith(" ")]
    assert not (tmp_path / "out").exists()
    export_and_show(str(folder), options, dry_run=False, console=Console(file=StringIO(), width=200))
    assert sorted(planned) == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_an_exported_adapter_is_a_reward_models(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", SECOND)
    folder = save_reward_adapter(tmp_path / "adapter", base)
    export_model(str(folder), ExportOptions("adapter", tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    live = rewards(load_model(folder, dtype=torch.float32))
    assert torch.equal(rewards(load_model(tmp_path / "out", dtype=torch.float32)), live)


@pytest.mark.parametrize("merged", [False, True])
def test_the_card_says_where_the_input_ends_and_its_code_gives_our_reward(merged: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", SECOND)
    made = save_reward_adapter(tmp_path / "adapter", base)
    export_model(str(made), ExportOptions("hf" if merged else "adapter", tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "The input must end at `<end_of_turn>`" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"out"', repr(str(tmp_path / "out")))
    assert code.count(str(tmp_path / "out")) == 2
    names: dict[str, Any] = {}
    exec(code.replace("print(", "reward = ("), names)
    encoder = ChatEncoder(load_tokenizer(TINY))
    ids = names["inputs"]["input_ids"]
    assert int(ids[0, -1]) == encoder.control.end_of_turn
    assert int((ids == encoder.control.bos).sum()) == 1
    live = load_model(made, dtype=torch.float32)
    with torch.no_grad():
        assert abs(names["reward"] - float(live(input_ids=ids).logits)) <= 1e-4 * abs(names["reward"])


def test_no_gguf_and_no_graft_is_made_of_a_reward_model(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", SECOND)
    folder = save_reward_adapter(tmp_path / "adapter", base)
    with pytest.raises(UserError) as refused:
        export_model(str(folder), ExportOptions("gguf", tmp_path / "out", push="me/it"))
    assert str(refused.value) == (
        f"{folder}: a reward model, and a GGUF file has no place for its head; --to hf keeps it, and gemma-ft score "
        f"{folder} --input ROWS --output FILE scores rows"
    )
    with pytest.raises(UserError) as refused:
        merge_model(str(folder), tmp_path / "out", graft=True, prompts=0)
    assert str(refused.value) == (
        f"{folder}: a reward model, and a multimodal folder has no place for its head; leave --graft out"
    )
    assert not (tmp_path / "out").exists()


def test_a_lost_head_and_a_classifiers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_base(tmp_path / "base", SECOND)
    folder = save_reward_adapter(tmp_path / "adapter", base)
    (folder / "gemma_ft.json").unlink()
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    save_file({name: one for name, one in whole.items() if name != SCORE}, path)
    for verb in (lambda: load_model(folder), lambda: merge_model(str(folder), tmp_path / "out", prompts=0)):
        with pytest.raises(UserError) as refused:
            verb()
        assert str(refused.value) == (
            f"{path}: a reward model's adapter without its head ({SCORE}); save it again with task_type SEQ_CLS, which "
            "keeps it"
        )
    save_file(whole | {SCORE: whole[SCORE].repeat(2, 1)}, path)
    with pytest.raises(UserError) as refused:
        load_model(folder)
    assert str(refused.value) == (
        f"{folder}: its head gives 2 numbers, a classifier's; a reward model gives one (num_labels 1)"
    )
