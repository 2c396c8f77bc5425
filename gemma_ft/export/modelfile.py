"""An Ollama Modelfile beside a GGUF file: the turns of a chat as a Go template, and where an answer ends."""

from __future__ import annotations

import json

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.chat_format import ChatFormat

# Go's templates cannot raise an error of their own; cutting a text where it has no end raises one that quotes the text.
REFUSAL = '{{ if .System }}{{ slice "system turns are refused by this model" 99 }}{{ end }}'


def go_template(format: ChatFormat) -> str:
    """The turns of a chat format, up to where the next answer begins, as Ollama renders them from `.System` (all system
    texts) and `.Messages`.

    BOS is not in it: Ollama's tokenizer puts it first, as the GGUF file says. Ollama cannot strip texts as training
    did.
    Source: ollama template/template.go (Execute, collate); docs/template.md.
    """
    user, model, tail = format.head("user"), format.head("assistant"), format.end + format.after_turn
    before, first = "", ""  # all turns; the first question
    if format.system == "error":
        before = REFUSAL
    elif format.system == "turn":
        before = "{{ if .System }}" + format.head("system") + "{{ .System }}" + tail
        if format.default_system is not None:
            words = json.dumps(format.default_system, ensure_ascii=False)
            before += "{{ else }}" + format.head("system") + "{{ " + words + " }}" + tail
        before += "{{ end }}"
    elif format.system == "fold":
        before = "{{ $system := .System }}"
        first = "{{ if $system }}{{ $system }}" + format.after_system + '{{ $system = "" }}{{ end }}'
    return (
        before
        + '{{ range .Messages }}{{ if eq .Role "user" }}'
        + user + first + "{{ .Content }}" + tail
        + '{{ else if eq .Role "assistant" }}'
        + model + "{{ .Content }}" + tail
        + "{{ end }}{{ end }}"
        + model
    )  # fmt: skip


def modelfile(gguf_name: str, encoder: ChatEncoder, *, notice: str | None = None) -> str:
    """The text of a Modelfile for the GGUF file of that name beside it, asked as an encoder does; `notice`: what its
    license says. Stop ids that are ordinary text have no line, for the text would end an answer wherever it stands.

    Ollama's own defaults would punish the repetitions that structured answers need: greedy decoding then gives the text
    that gemma-ft gives.
    """
    ids = dict.fromkeys((encoder.control.end_of_turn, *encoder.stop_ids))
    ends = encoder.tokenizer.convert_ids_to_tokens([id for id in ids if id in encoder.content.control_ids])
    lines = [
        f"# ollama create NAME -f this-file, in the folder of {gguf_name}",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{go_template(encoder.format)}"""',
        *(f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends),
        "PARAMETER repeat_penalty 1.0",
    ]
    return "\n".join([*lines, *([f'LICENSE """{notice}"""'] if notice else [])]) + "\n"
