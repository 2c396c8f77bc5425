"""What is refused, and what is not imported, before a verb takes seconds to begin."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_ft.cli import start
from gemma_ft.cli.app import main
from gemma_ft.system import environment
from tests.data.conftest import TINY

LIGHT_VERBS = """
import sys
from gemma_ft.cli.app import main
codes = [main(["preview", "sft_tiny", "--rows", "1"]), main(["data", "check", "sft_tiny", "--out", sys.argv[1]])]
heavy = [name for name in ("torch", "trl", "peft", "bitsandbytes", "accelerate", "datasets") if name in sys.modules]
print(codes, heavy, file=sys.stderr)
"""


def test_rows_are_looked_at_without_what_trains_them(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT_VERBS, str(tmp_path / "report.json")], capture_output=True,
                          text=True)  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[0, 0] []"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that takes seconds may be reached."""

    def reached(**_: object) -> None:
        raise AssertionError("libraries are imported already")

    monkeypatch.setattr(environment, "quiet_libraries", reached)


def folder_of_type(folder: Path, model_type: object) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return folder


FOREIGN = ("gemma3n_text", "gemma4_text", "llama", None)


@pytest.mark.parametrize("model_type", FOREIGN)
@pytest.mark.parametrize(
    "verb",
    [["generate", "--prompt", "Hi"], ["chat"], ["serve"], ["merge", "--out", "x"], ["eval"],
     ["export", "--to", "gguf", "--out", "x"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_another_family_is_refused_at_once(
    verb: list[str], model_type: object, at_once: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_type(tmp_path / "other", model_type)
    assert main([verb[0], str(folder), *verb[1:]]) == 2
    assert capsys.readouterr().err == (
        f"{folder}: model_type {model_type!r} is not Gemma 1, 2, 3 or VaultGemma; supported: "
        "gemma, gemma2, gemma3_text, vaultgemma, gemma3\n"
    )


def test_an_adapter_of_another_family_is_refused_at_once(
    at_once: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folder_of_type(tmp_path / "other", "gemma3n_text"), tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "Hi"]) == 2
    assert capsys.readouterr().err == (
        f"{adapter}/adapter_config.json: base model {base}: model_type 'gemma3n_text' is not Gemma 1, 2, 3 "
        "or VaultGemma; supported: gemma, gemma2, gemma3_text, vaultgemma, gemma3\n"
    )


@pytest.mark.parametrize("verb", [["train"], ["preview"], ["data", "check"], ["plan"]], ids=" ".join)
def test_weights_of_another_size_are_refused_before_their_tokenizer_is_read(
    verb: list[str], at_once: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_type(tmp_path / "tiny", "gemma2")
    assert main([*verb, "sft_tiny", f"model.weights={folder}", "model.preset=gemma-2-2b"]) == 2
    assert capsys.readouterr().err == (
        f"model.preset: {folder} is not a gemma-2-2b (num_hidden_layers 6, not 26); set model.preset: gemma-tiny\n"
    )


@pytest.mark.parametrize("verb", [["train"], ["preview"], ["data", "check"], ["plan"]], ids=" ".join)
def test_weights_that_are_no_model_folder_are_refused_at_once(
    verb: list[str], at_once: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "x.gguf", tmp_path / "run"
    file.write_bytes(b"GGUF")
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    for place, told in (
        (file, "a GGUF file; name a folder with a model, or a hub id (owner/name); gemma-ft import FILE --out DIR"),
        (run, "a run with an adapter, no model of its own"),
    ):
        assert main([*verb, "sft_tiny", f"model.weights={place}"]) == 2
        assert capsys.readouterr().err.startswith(f"model.weights: {place}: {told}")
    assert main(["plan", "sft_tiny", "model.weights=random", "strategy=full", "~adapter", "~quantize",
                 "model.tokenizer=data/gemma-tiny"]) == 0  # fmt: skip


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"hidden_size": "x"'])
def test_what_cannot_be_read_is_left_to_the_reader(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(damage)
    (tmp_path / "adapter_config.json").write_bytes(damage)
    start.check_model(str(tmp_path), tmp_path)
    start.check_model(str(tmp_path / "not there"))
    shutil.copy(TINY / "config.json", tmp_path)
    start.check_model(str(tmp_path))


def test_the_collector_waits_once_and_only_at_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.unfreeze()  # what tests/conftest.py leaves out
    start.collect_late()  # torch is there: a process that has begun
    usual = gc.get_threshold()
    assert usual[0] < start.OBJECTS_OF_A_START
    monkeypatch.delitem(sys.modules, "torch")
    start.collect_late()
    assert gc.get_threshold() == (start.OBJECTS_OF_A_START, *usual[1:])
    gc.collect()
    assert (gc.get_threshold(), gc.callbacks.count(None)) == (usual, 0)
    assert gc.get_freeze_count() > 0
