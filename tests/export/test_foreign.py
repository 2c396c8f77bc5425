"""What was tuned elsewhere keeps its template and its stop ids in every form of an export, and in a merge."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig

from gemma_ft.build.place import place_of
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.chat_format import gemma_format
from gemma_ft.data.encode.own_template import CURE, own_encoder
from gemma_ft.errors import UserError
from gemma_ft.export.export import ExportOptions
from gemma_ft.export.gguf_chat import StopKeys, chat_notes
from gemma_ft.export.merge.merge import merge_to_folder
from gemma_ft.export.modelfile import go_template, modelfile
from gemma_ft.families.chat_template import TURNS
from gemma_ft.ui.export import export_and_show
from tests.foreign import CHATML, IM_END, TEMPLATES, foreign_tokenizer, save_foreign, save_foreign_adapter

UNKNOWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def exported(folder: Path, to: Any, out: Path) -> list[str]:
    console = Console(file=io.StringIO(), width=500)
    export_and_show(str(folder), ExportOptions(to=to, out=out), console=console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.removeprefix("note: ") for line in printed.splitlines() if line.startswith("note: ")]


def ends(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign(tmp_path_factory.mktemp("foreign") / "model")


def test_a_transformers_folder_keeps_template_and_stop_ids(chatml: Path, tmp_path: Path) -> None:
    """transformers 5.24's `generate` ends where generation_config.json says."""
    assert exported(chatml, "hf", tmp_path / "x") == []
    assert ends(tmp_path / "x") == [1, IM_END]
    assert GenerationConfig.from_pretrained(str(tmp_path / "x")).eos_token_id == [1, IM_END]
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "x"))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, "<|im_end|>")
    card = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    assert f"| an answer ends at | token ids 1, {IM_END} |" in card
    assert "| chat template | ChatML |" in card
    assert "| a system turn | is a turn of its own |" in card
    assert "| BOS | none: a chat begins with its first turn |" in card


@pytest.mark.parametrize(
    ("template", "stop_ids", "expected"),
    [
        (TEMPLATES["Gemma's turns, system refused"], [1, 6, 50, 51], [1, 6, 50, 51]),
        (TEMPLATES["Llama 3's headers"], None, [1, 2052]),
        (UNKNOWN, [7], [1, 7]),
    ],
)
def test_stop_ids_of_the_folder_are_kept(tmp_path: Path, template: str, stop_ids: Any, expected: list[int]) -> None:
    folder = save_foreign(tmp_path / "model", template, eos="<eos>", stop_ids=stop_ids)
    notes = exported(folder, "hf", tmp_path / "x")
    assert ends(tmp_path / "x") == expected
    assert AutoTokenizer.from_pretrained(str(tmp_path / "x")).chat_template == template
    if template == UNKNOWN:  # copied as it is
        assert notes == [
            f"{folder}: its chat template writes none of the turns that are known here "
            f"(Gemma's turns, ChatML, Llama 3's headers); {CURE}"
        ]


@pytest.mark.parametrize("contract", [True, False])
def test_a_merge_keeps_the_stop_ids_of_its_base(tmp_path: Path, contract: bool) -> None:
    template = TEMPLATES["Gemma's turns, system refused"]
    base = save_foreign(tmp_path / "base", template, eos="<eos>", stop_ids=[1, 6, 50, 51])
    generation = base / "generation_config.json"
    told = json.loads(generation.read_text(encoding="utf-8"))
    generation.write_text(json.dumps({**told, "pad_token_id": 3, "top_k": 64}), encoding="utf-8")
    merge_to_folder(place_of(save_foreign_adapter(tmp_path / "adapter", base, contract=contract)), tmp_path / "x")
    found = json.loads((tmp_path / "x" / "generation_config.json").read_text(encoding="utf-8"))
    assert found == {**told, "eos_token_id": [1, 6, 50, 51], "pad_token_id": 3, "top_k": 64}
    saved = (tmp_path / "x" / "chat_template.jinja").read_text(encoding="utf-8")
    assert saved == (gemma_format(TURNS, "drop").template if contract else template)


def test_a_gguf_and_its_modelfile_say_the_same(chatml: Path, tmp_path: Path) -> None:
    """Keys of ggml's docs/gguf.md; llama.cpp ends an answer at eos, eot and eom (src/llama-vocab.cpp)."""
    notes = exported(chatml, "gguf", tmp_path / "x")
    reader = gguf.GGUFReader(str(tmp_path / "x" / "x-bf16.gguf"))
    keys = ("eos_token_id", "eot_token_id", "add_bos_token")
    assert [reader.fields[f"tokenizer.ggml.{key}"].contents() for key in keys] == [1, IM_END, False]
    assert "tokenizer.ggml.eom_token_id" not in reader.fields
    assert reader.fields["tokenizer.chat_template"].contents() == CHATML
    text = (tmp_path / "x" / "Modelfile").read_text(encoding="utf-8")
    assert '<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else if eq .Role "assistant" }}<|im_start|>assistant' in text
    assert [line for line in text.splitlines() if "stop" in line] == [
        'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<eos>"'
    ]  # fmt: skip
    assert "start_of_turn" not in text
    assert notes == ["its chat template begins without BOS, so the file asks for none, in chats and in plain text"]


def test_an_unknown_template_is_no_gguf(tmp_path: Path) -> None:
    folder = save_foreign(tmp_path / "model", UNKNOWN)
    with pytest.raises(UserError) as raised:
        export_and_show(
            str(folder), ExportOptions(to="gguf", out=tmp_path / "x"), dry_run=True, console=Console(file=io.StringIO())
        )
    assert str(raised.value) == (
        f"{folder}: its chat template writes none of the turns that are known here "
        f"(Gemma's turns, ChatML, Llama 3's headers); {CURE}"
    )


def test_what_does_not_fit_into_a_gguf_is_told() -> None:
    encoder = own_encoder(foreign_tokenizer(TEMPLATES["Llama 3's headers"]), "FOLDER").but(stop_ids=[50, 6, 2049])
    text = encoder.tokenizer.convert_ids_to_tokens(50)
    assert StopKeys.of(encoder) == (1, 2052, 50, [6, 2049])
    assert chat_notes(encoder) == [
        "GGUF has keys for three stop ids (eos, eot, eom); there is none for 6 ('<end_of_turn>'), 2049 ('<|im_end|>')",
        f"the Modelfile has no stop line for 50 ({text!r}), which is ordinary text",
    ]
    lines = modelfile("x.gguf", encoder).splitlines()
    assert [line for line in lines if "stop" in line] == [
        'PARAMETER stop "<|eot_id|>"', 'PARAMETER stop "<eos>"', 'PARAMETER stop "<end_of_turn>"',
        'PARAMETER stop "<|im_end|>"',
    ]  # fmt: skip


def test_nothing_is_told_of_a_gemma_that_was_trained_here() -> None:
    encoder = ChatEncoder(foreign_tokenizer())
    assert StopKeys.of(encoder) == (1, 6, None, [])
    assert chat_notes(encoder) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_refuses_or_leaves_out_what_the_template_does(name: str) -> None:
    found = go_template(own_encoder(foreign_tokenizer(TEMPLATES[name]), "FOLDER").format)
    assert ("system turns are refused" in found) == (name == "Gemma's turns, system refused")
    assert ("System" in found) == (name != "Gemma's turns, system left out")
    assert ('"You are \\"kind\\" and **brief**."' in found) == (name == "ChatML with a default")
