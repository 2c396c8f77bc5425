"""A file of weights, an adapter or a run given where a folder with a model is wanted: called what it is, in every verb,
with what to give instead.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gemma_ft.__main__ import main
from gemma_ft.build.inputs import build_tokenizer, weights_source
from gemma_ft.build.located import Source, model_source
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import checked_weights, load_model, load_tokenizer
from gemma_ft.build.weights import WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.recipe.load import load_recipe

MODEL = "name a folder with a model, or a hub id (owner/name)"
GGUF = f"a GGUF file; {MODEL}; gemma-ft import FILE --out DIR makes one of it"
PICKLE = (
    "a pickle, which can run code when it is opened and is refused; convert it to safetensors where it was made; "
    f"{MODEL}"
)
FILES = {
    "gemma3-270m.gguf": GGUF,
    "Model.Q4_K_M.GGUF": GGUF,
    "blob-without-a-name": GGUF,  # by its first bytes
    "pytorch_model.bin": PICKLE,
    "model.pt": PICKLE,
    "last.ckpt": PICKLE,
    "alone.safetensors": f"weights alone, with no config.json beside them; {MODEL}",
    "adapter_model.safetensors": "the weights of an adapter; name their folder, .",
    "notes.txt": f"a file, not a folder; {MODEL}",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        (tmp_path / name).write_bytes(b"GGUF\x03" if name.startswith("blob") else b"abc")
    return tmp_path


def line(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_what_it_is(name: str) -> None:
    expected = f"{name}: {FILES[name]}"
    assert line(place_of, name) == line(load_model, name) == line(load_tokenizer, name) == expected
    recipe = load_recipe("sft_tiny", [f"model.weights={name}"]).recipe
    assert line(weights_source, recipe) == line(build_tokenizer, recipe) == f"model.weights: {expected}"
    recipe = load_recipe("sft_tiny", [f"model.tokenizer={name}"]).recipe
    assert line(build_tokenizer, recipe) == f"model.tokenizer: {expected}"


@pytest.mark.parametrize(
    "arguments",
    [["generate", "{}", "--prompt", "x"], ["chat", "{}"], ["serve", "{}"], ["merge", "{}", "--out", "o"],
     ["export", "{}", "--to", "gguf", "--out", "o"], ["generate", "{}", "--input", "notes.txt", "--output", "o"]],
    ids=str,
)  # fmt: skip
def test_every_verb_calls_it_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gemma3-270m.gguf", "pytorch_model.bin"):
        assert main([one.format(name) for one in arguments]) == 2
        assert capsys.readouterr().err == f"{name}: {FILES[name]}\n"


def test_eval_calls_it_so(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["eval", *arguments]) == 2
        return capsys.readouterr().err

    what = GGUF.partition(";")[0]
    assert refused("gemma3-270m.gguf") == f"gemma3-270m.gguf: {what}; give a run directory or a recipe\n"
    assert refused("sft_tiny", "--merged", "gemma3-270m.gguf") == (
        f"--merged gemma3-270m.gguf: {what}; give a folder that gemma-ft merge wrote\n"
    )
    assert refused("sft_tiny", "--adapter", "gemma3-270m.gguf") == (
        f"--adapter gemma3-270m.gguf: {what}; name a PEFT adapter folder, or a run with one\n"
    )
    assert refused("sft_tiny", "model.weights=gemma3-270m.gguf") == f"model.weights: gemma3-270m.gguf: {GGUF}\n"


def test_an_adapters_file_is_known_by_its_folder(here: Path) -> None:
    (here / "ad").mkdir()
    (here / "ad" / "adapter_model.safetensors").write_bytes(b"abc")
    found = line(place_of, "data/gemma-tiny", "ad/adapter_model.safetensors")
    assert found == "ad/adapter_model.safetensors: the weights of an adapter; name their folder, ad"
    assert line(place_of, "data/gemma-tiny", "model.pt") == (
        "model.pt: a pickle, which can run code when it is opened and is refused; "
        "name a PEFT adapter folder, or a run with one"
    )


def test_a_models_file_is_known_by_its_folder(here: Path) -> None:
    (here / "m").mkdir()
    (here / "m" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, "m/model-00001-of-00002.safetensors")
    (here / "m" / "model.safetensors.index.json").write_text("{}")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        assert line(place_of, f"m/{name}") == f"m/{name}: the weights of a model; name their folder, m"


def test_a_folder_of_gguf_alone(here: Path) -> None:
    (here / "g").mkdir()
    (here / "g" / "gemma.gguf").write_bytes(b"GGUF")
    assert line(place_of, "g") == f"g/gemma.gguf: {GGUF}"
    (here / "g" / "config.json").write_text("{}")
    assert line(WeightFiles.open, Path("g")) == f"g/gemma.gguf: {GGUF}"


def test_an_adapter_or_a_run_as_weights_is_to_be_merged_first(here: Path) -> None:
    """Going on from an adapter: it is no model of its own."""
    (here / "run" / "adapter").mkdir(parents=True)
    (here / "run" / "adapter" / "adapter_config.json").write_text("{}")
    (here / "full" / "model").mkdir(parents=True)
    (here / "full" / "model" / "config.json").write_text("{}")

    def weights(name: str) -> str:
        return line(weights_source, load_recipe("sft_tiny", [f"model.weights={name}"]).recipe)

    assert weights("run") == (
        "model.weights: run: a run with an adapter, no model of its own; merge it first (gemma-ft merge run --out DIR) "
        "and give DIR"
    )
    assert weights("run/adapter") == (
        "model.weights: run/adapter: an adapter, no model of its own; merge it first (gemma-ft merge run/adapter "
        "--out DIR) and give DIR"
    )
    assert weights("full") == "model.weights: full: a run; give the model in it, full/model"
    adapter = Source(str(here / "run" / "adapter"), None)  # as one from the hub, which is a folder when it is here
    assert line(checked_weights, adapter).endswith(f"(gemma-ft merge {adapter.name} --out DIR) and give DIR")
    (here / "on").mkdir()
    (here / "on" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "run/adapter"})
    )
    (here / "on" / "adapter_model.safetensors").write_bytes(b"abc")
    assert line(place_of, "on").startswith("on/adapter_config.json: base model run/adapter: an adapter, no model of")


def test_what_is_a_model_is_taken_as_before(here: Path) -> None:
    assert Path(model_source("data/gemma-tiny").name).is_dir()
    (here / "run" / "adapter").mkdir(parents=True)
    (here / "run" / "adapter" / "adapter_config.json").write_text("{}")
    assert model_source("run/adapter", weights=False).name == str(here / "run" / "adapter")  # its tokenizer
    (here / "both").mkdir()
    for name in ("config.json", "adapter_config.json"):
        (here / "both" / name).write_text("{}")
    assert line(checked_weights, model_source("both")).endswith("move it to its own folder")
    assert line(model_source, "nowhere/at/all") == f"nowhere/at/all: no such folder; {MODEL}"
    assert model_source("google/gemma-2-2b") == Source("google/gemma-2-2b", None)


@pytest.mark.parametrize("name", ["my run", "Anna's run", "run $1"])
def test_a_command_in_a_message_can_be_pasted(here: Path, name: str) -> None:
    """A shell takes the folder for one word, whatever is in its name."""
    (here / name).mkdir()
    (here / name / "adapter_config.json").write_text("{}")
    message = line(model_source, name)
    command = message.partition("(")[2].partition(")")[0]
    assert shlex.split(command) == ["gemma-ft", "merge", name, "--out", "DIR"]
