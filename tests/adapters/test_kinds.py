"""The tables of what is computed of PEFT's adapters: nothing that PEFT has is missing, and what is refused is one line,
before any weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import PeftType

from gemma_ft.adapters.adapter_config import adapter_config
from gemma_ft.adapters.kinds import OPTIONS, STARTS, TYPES
from gemma_ft.build import pretrained
from gemma_ft.build.place import place_of
from gemma_ft.cli.app import main
from gemma_ft.errors import UserError
from tests.export.tuned import save_base, wrap
from tests.parity.amplified import SECOND, ours


def test_every_type_that_peft_has_is_in_the_table() -> None:
    """peft 0.21.2's own enum; older PEFTs have some of them."""
    assert {one.value for one in PeftType} <= TYPES.keys()


def test_every_option_of_lora_is_in_the_table() -> None:
    assert {one.name for one in dataclasses.fields(LoraConfig)} <= OPTIONS.keys()


def test_every_start_of_lora_is_in_the_table() -> None:
    """The words in the annotation of init_lora_weights, and "lora_ga", which peft 0.21.2 takes and does not name."""
    _, words = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    assert {True, False, *typing.get_args(words), "lora_ga"} <= STARTS.keys()


def saved(folder: Path, **settings: Any) -> Path:
    """A folder with the config of an adapter, and no weights."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM", "peft_version": "0.21.2", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        place_of(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/adapter_config.json: ")


@pytest.mark.parametrize(
    "kind", [name for name, why in TYPES.items() if why is not None and name in PeftType.__members__]
)
def test_other_types_are_refused_before_weights_are_looked_for(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    assert refused(folder) == f"a {kind} adapter is not supported: {TYPES[kind]}"


CONVERT = "rewrote the base; save it as a plain LoRA with PEFT's path_initial_model_for_weight_conversion"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"init_lora_weights": "pissa"}, f"init_lora_weights 'pissa' {CONVERT}"),
        ({"init_lora_weights": "pissa_niter_4"}, f"init_lora_weights 'pissa_niter_4' {CONVERT}"),
        ({"init_lora_weights": "pissa_niter_16"}, f"init_lora_weights 'pissa_niter_16' {CONVERT}"),
        ({"init_lora_weights": "olora"}, f"init_lora_weights 'olora' {CONVERT}"),
        ({"init_lora_weights": "OLoRA"}, f"init_lora_weights 'OLoRA' {CONVERT}"),
        ({"init_lora_weights": "corda"}, f"init_lora_weights 'corda' {CONVERT}"),
        ({"init_lora_weights": "lora_ga"}, f"init_lora_weights 'lora_ga' {CONVERT}"),
        ({"init_lora_weights": "a_new_one"},
         "init_lora_weights 'a_new_one' is not known here; save it as a plain LoRA with PEFT's "
         "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 1]]},
         "layer_replication is set, which is not supported: it repeats layers; merge it with PEFT (merge_and_unload) "
         "where it was trained, and give the merged folder"),
        ({"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
         "kasa_config is set, which is not supported: it rewrote the base; merge it with PEFT (merge_and_unload) where "
         "it was trained, and give the merged folder"),
        ({"use_qalora": True},
         "use_qalora is set, which is not supported: it is made for a GPTQ base; train it without"),
        ({"task_type": "TOKEN_CLS"},
         "task_type TOKEN_CLS is not supported; only adapters for CAUSAL_LM and SEQ_CLS are"),
        ({"peft_version": "0.22.0", "use_moon": True},
         "use_moon: was set by PEFT 0.22.0, 0.21.2 does not know it; install that PEFT"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_computed_is_refused_before_weights_are_looked_for(
    settings: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.__version__", "0.21.2")
    assert refused(saved(tmp_path / "adapter", **settings)) == line


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": None},
        {"loftq_config": {"loftq_bits": 4}, "use_rslora": True, "bias": "all"},
        {"peft_version": "99.0.0"},
        {"peft_version": "99.0.0", "use_moon": False, "moon_config": None},
        {"peft_version": "0.3.0", "enable_lora": None, "merge_weights": True, "fan_in_fan_out": False},
        {"task_type": None, "qalora_group_size": 32, "megatron_core": "megatron.core"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_nothing_is_no_reason_to_refuse(settings: dict[str, Any], tmp_path: Path) -> None:
    assert adapter_config(saved(tmp_path / "adapter", **settings)).r == 4


VERBS = [
    ["generate", "--prompt", "x"],
    ["merge", "--out", "out"],
    ["export", "--to", "hf", "--out", "out"],
    ["export", "--to", "adapter", "--out", "out"],
    ["chat"],
    ["serve"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_all_verbs_ask_the_same_function(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "adapter", init_lora_weights="pissa_niter_4")
    assert main([verb[0], "adapter", *verb[1:]]) == 2
    assert capsys.readouterr().err.strip() == (
        f"gemma-ft: adapter/adapter_config.json: init_lora_weights 'pissa_niter_4' {CONVERT}"
    ).removeprefix("gemma-ft: ")


def test_a_base_that_an_adapter_would_replace_is_refused(tmp_path: Path) -> None:
    """PEFT saves the embedding beside an adapter on it, and puts it into the base on the way back."""
    base = save_base(tmp_path / "base", SECOND)
    for seed, name in ((0, "same"), (1, "other")):
        model = ours(SECOND, vocab_size=2048, num_hidden_layers=2, seed=seed)
        wrapped = wrap(model, target_modules=["embed_tokens"])
        wrapped.peft_config["default"].base_model_name_or_path = str(base)
        wrapped.save_pretrained(tmp_path / name)
    assert pretrained.load_model(tmp_path / "same", dtype=torch.float32) is not None
    with pytest.raises(UserError) as caught:
        pretrained.load_model(tmp_path / "other", dtype=torch.float32)
    assert str(caught.value) == (
        f"{tmp_path / 'other'}: base_model.model.model.embed_tokens.base_layer.weight holds another weight than its "
        "base has; merge it (gemma-ft merge), or train with the base's own left as they are"
    )


def test_a_converted_start_is_a_plain_adapter_on_the_true_base(tmp_path: Path) -> None:
    """The cure that is named, with peft 0.21.2: what was trained comes back, and the base beside it is the folder's."""
    from gemma_ft.adapters.lora import adapter_off
    from tests.parity.amplified import relative, token_rows

    base = save_base(tmp_path / "base", SECOND)
    model = get_peft_model(
        pretrained.load_base(pretrained.Source(str(base), None), dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"),
    )
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.mul_(1.1)
    ids = token_rows()
    trained = model.eval()(ids).logits.detach()
    config.init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = pretrained.load_model(tmp_path / "adapter", dtype=torch.float32)
    plain = pretrained.load_model(base, dtype=torch.float32)(ids).logits
    with torch.no_grad():
        assert relative(loaded(ids).logits, trained) <= 1e-4
        with adapter_off(loaded):
            assert torch.equal(loaded(ids).logits, plain)
        assert relative(trained, plain) > 1e-2
