"""What accelerate's configs may say, and that all that ship can be read."""

from __future__ import annotations

import os

import pytest
import yaml

from gemma_ft.errors import UserError
from gemma_ft.system.environment import Launch, launched
from gemma_ft.system.shipped import shipped_launches

CONFIGS = {path.stem: path for path in shipped_launches()}
RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)


def test_all_that_are_promised_ship() -> None:
    assert sorted(CONFIGS) == [
        "cpu_2ranks", "ddp", "fsdp2", "fsdp2_offload", "fsdp2_qlora", "multi_node", "one_device"
    ]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it_and_it_changes_no_number(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(CONFIGS[name])).num_processes >= 1
    said = yaml.safe_load(CONFIGS[name].read_text())
    assert said["mixed_precision"] == "no"
    assert set(said.get("fsdp_config", {})) <= {"fsdp_version", "fsdp_reshard_after_forward", "fsdp_offload_params"}


def test_without_a_launcher_there_is_one_rank() -> None:
    assert launched() == Launch()


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate itself is not to see that the model is sharded."""
    for name, value in {
        **RANKS, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_MIXED_PRECISION": "no",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    expected = Launch(1, 2, 1, 2, fsdp=True, reshard_after_forward=False, offload=True)
    assert launched() == expected
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16",
         "mixed_precision: bf16: the recipe's train.precision decides; set it to 'no'"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed: true: not supported; use FSDP version 2"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend: inductor: compiling is not supported; leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true",
         "fsdp_activation_checkpointing: true: the recipe's train.gradient_checkpointing decides; set it to false"),
    ],
)  # fmt: skip
def test_what_would_change_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, line: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as raised:
        launched()
    assert str(raised.value) == f"accelerate config: {line}"


def test_the_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError) as raised:
        launched()
    assert str(raised.value) == "accelerate config: fsdp_version: 1 is not supported; set it to 2"
