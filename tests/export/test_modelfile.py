"""The Modelfile: Ollama's template language renders the turns that were trained."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.chat_format import gemma_format
from gemma_ft.data.encode.own_template import own_encoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.export.modelfile import go_template, modelfile
from gemma_ft.families.chat_template import SYSTEM_POLICIES, TURNS
from tests.export.tuned import TINY
from tests.foreign import TEMPLATES, foreign_tokenizer

# Ollama's own way with a template: system texts joined, neighbours of one role joined, then text/template.
# Source: ollama template/template.go (Execute, collate).
PROGRAM = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct{ Role, Content string }

func main() {
	var chats [][]Message
	source, _ := os.ReadFile(os.Args[1])
	json.NewDecoder(os.Stdin).Decode(&chats)
	made := template.Must(template.New("").Option("missingkey=zero").Parse(string(source)))
	rendered := []string{}
	for _, chat := range chats {
		var system []string
		var messages []*Message
		for i := range chat {
			if chat[i].Role == "system" { system = append(system, chat[i].Content) }
			messages = append(messages, &chat[i])
		}
		var text strings.Builder
		err := made.Execute(&text, map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": messages})
		if err != nil { text.Reset(); text.WriteString("error: " + err.Error()) }
		rendered = append(rendered, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""
CHATS = [
    [("user", "Hi")],
    [("user", "Hi"), ("assistant", "Yo\n\nyes"), ("user", "So?")],
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yo"), ("user", "So?")],
]
FOLDED = """FROM ./x.gguf
TEMPLATE \"\"\"{{ $system := .System }}{{ range .Messages }}{{ if eq .Role "user" }}<start_of_turn>user
{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}{{ .Content }}<end_of_turn>
{{ else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}<end_of_turn>
{{ end }}{{ end }}<start_of_turn>model
\"\"\"
PARAMETER stop "<end_of_turn>"
PARAMETER stop "<eos>"
PARAMETER repeat_penalty 1.0
LICENSE \"\"\"Terms\"\"\"
"""


def test_the_whole_file() -> None:
    first, _, rest = modelfile("x.gguf", ChatEncoder(load_tokenizer(TINY)), notice="Terms").partition("\n")
    assert first.startswith("# ollama create NAME -f ")
    assert rest == FOLDED


def test_a_system_turn_is_dropped_or_refused_as_trained() -> None:
    assert "System" not in go_template(gemma_format(TURNS, "drop"))
    assert go_template(gemma_format(TURNS, "error")).endswith(go_template(gemma_format(TURNS, "drop")))
    assert "system turns are refused by this model" in go_template(gemma_format(TURNS, "error"))


ENCODERS: dict[str, Callable[[], ChatEncoder]] = {
    policy: partial(lambda one: ChatEncoder(load_tokenizer(TINY), one), policy) for policy in SYSTEM_POLICIES
} | {name: partial(lambda one: own_encoder(foreign_tokenizer(one), "x"), one) for name, one in TEMPLATES.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_go_renders_the_turns_of_the_template(name: str, tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed: Ollama's template language is its text/template")
    (tmp_path / "main.go").write_text(PROGRAM)
    encoder = ENCODERS[name]()
    (tmp_path / "template").write_text(go_template(encoder.format))
    messages = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
    run = subprocess.run([go, "run", str(tmp_path / "main.go"), str(tmp_path / "template")],
                         input=json.dumps(messages), capture_output=True, text=True, check=True)  # fmt: skip
    tokenizer = encoder.tokenizer
    for chat, found in zip(messages, json.loads(run.stdout), strict=True):
        if encoder.system_policy == "error" and chat[0]["role"] == "system":
            assert found.startswith("error: ")
            assert "system turns are refused by this model" in found
            continue
        expected = tokenizer.apply_chat_template(
            chat, chat_template=encoder.format.template, tokenize=False, add_generation_prompt=True
        )
        assert "<bos>" * encoder.format.bos + found == expected
