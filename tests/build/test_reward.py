"""A recipe of the objective reward becomes a reward model; what cannot be one is refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.build.empty_weights import empty_base, is_empty
from gemma_ft.build.inputs import build_tokenizer
from gemma_ft.build.located import Source, is_reward
from gemma_ft.build.model import build_model
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_base
from gemma_ft.errors import UserError
from gemma_ft.model.reward import GemmaForSequenceClassification
from gemma_ft.recipe.load import load_recipe
from tests.export.tuned import save_base
from tests.parity.amplified import SECOND, THIRD
from tests.reward import TINY, save_reward_adapter

HEAD = "score.weight"


def built(*overrides: str, empty: bool = False) -> Any:
    recipe = load_recipe("sft_tiny", ["objective.kind=reward", "data.eval=null", *overrides]).recipe
    return build_model(recipe, build_tokenizer(recipe), empty=empty)[0]


@pytest.mark.parametrize("strategy", ["full", "lora", "qlora"])
def test_the_head_is_zero_float32_and_trained(strategy: str) -> None:
    model = built(f"strategy={strategy}", "train.precision=bf16")
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    (head,) = [one for name, one in trained.items() if "score" in name]
    assert (head.dtype, tuple(head.shape)) == (torch.float32, (1, model.config.hidden_size))
    assert not head.any()
    assert model.config.pad_token_id == 0
    assert model(input_ids=torch.tensor([[2, 9, 10]])).rewards.tolist() == [0.0]


def test_fresh_weights_can_be_a_reward_model() -> None:
    model = built("strategy=full", "model.weights=random", f"model.tokenizer={TINY}")
    assert isinstance(model, GemmaForSequenceClassification)


def test_an_adapter_to_start_from_is_to_be_merged_first() -> None:
    with pytest.raises(UserError) as refused:
        built("strategy=lora", "adapter.start=runs/mine")
    assert str(refused.value) == (
        "adapter.start: runs/mine: a reward model begins with a whole model; merge the adapter (gemma-ft merge), and "
        "set model.weights to the result"
    )


@pytest.mark.parametrize("shape", [SECOND, THIRD])
def test_an_empty_base_has_its_head(shape: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shape)
    model = empty_base(Source(str(base), None), dtype=torch.bfloat16, reward=True)
    assert (model.score.weight.dtype, bool(model.score.weight.any())) == (torch.float32, False)
    assert all(is_empty(one) for name, one in model.named_parameters() if name != HEAD and one.numel() > 1)
    loaded = load_base(Source(str(base), None), dtype=torch.float32, reward=True)
    with torch.no_grad():
        loaded.score.weight.fill_(0.25)
    loaded.save_pretrained(tmp_path / "reward")
    again = empty_base(Source(str(tmp_path / "reward"), None), dtype=torch.bfloat16, reward=True)
    assert torch.equal(again.score.weight, loaded.score.weight)


@pytest.mark.parametrize("load", [load_base, empty_base])
def test_a_reward_model_is_no_base_of_a_language_model(load: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", THIRD)
    load_base(Source(str(base), None), dtype=torch.float32, reward=True).save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError) as refused:
        load(Source(str(tmp_path / "reward"), None), dtype=torch.float32)
    assert str(refused.value) == (
        f"{tmp_path}/reward: a reward model, which has no head for tokens; name the model that it was made from"
    )


def test_small_files_tell_a_reward_model(tmp_path: Path) -> None:
    adapter = save_reward_adapter(tmp_path / "adapter")
    load_base(Source(str(TINY), None), dtype=torch.float32, reward=True).save_pretrained(tmp_path / "whole")
    for folder, expected in ((adapter, True), (tmp_path / "whole", True), (TINY, False), (tmp_path, True)):
        assert is_reward(folder) is expected, folder  # the last: a run with its adapter
        if folder is not tmp_path:
            assert place_of(folder).reward is expected
