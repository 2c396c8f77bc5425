"""An Ollama Modelfile beside a GGUF file: the trained turns as a Go template, and where an answer ends."""

from __future__ import annotations

from gemma_ft.data.template import (
    AFTER_ROLE,
    AFTER_SYSTEM,
    AFTER_TURN,
    END_OF_TURN,
    EOS,
    ROLE_NAMES,
    START_OF_TURN,
    SystemPolicy,
)

# Go's templates cannot raise an error of their own; cutting a text where it has no end raises one that quotes the text.
REFUSAL = '{{ if .System }}{{ slice "system turns are refused by this model" 99 }}{{ end }}'


def go_template(policy: SystemPolicy) -> str:
    """The turns that were trained, up to where the next answer begins, as Ollama renders them from `.System` (all
    system texts) and `.Messages`.

    BOS is not in it: Ollama's tokenizer puts it first, as the GGUF file says. Ollama cannot strip texts as training
    did.
    Source: ollama template/template.go (Execute, collate); docs/template.md.
    """
    head = {role: START_OF_TURN + name + AFTER_ROLE for role, name in ROLE_NAMES.items()}
    system = "{{ if $system }}{{ $system }}" + AFTER_SYSTEM + '{{ $system = "" }}{{ end }}' if policy == "fold" else ""
    return (
        (REFUSAL if policy == "error" else "")
        + ("{{ $system := .System }}" if policy == "fold" else "")
        + '{{ range .Messages }}{{ if eq .Role "user" }}'
        + head["user"] + system + "{{ .Content }}" + END_OF_TURN + AFTER_TURN
        + '{{ else if eq .Role "assistant" }}'
        + head["assistant"] + "{{ .Content }}" + END_OF_TURN + AFTER_TURN
        + "{{ end }}{{ end }}"
        + head["assistant"]
    )  # fmt: skip


def modelfile(gguf_name: str, policy: SystemPolicy, *, notice: str | None = None) -> str:
    """The text of a Modelfile for the GGUF file of that name beside it; `notice`: what its license says.

    Ollama's own defaults would punish the repetitions that structured answers need: greedy decoding then gives the text
    that gemma-ft gives.
    """
    lines = [
        f"# ollama create NAME -f this-file, in the folder of {gguf_name}",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{go_template(policy)}"""',
        f'PARAMETER stop "{END_OF_TURN}"',
        f'PARAMETER stop "{EOS}"',
        "PARAMETER repeat_penalty 1.0",
    ]
    return "\n".join([*lines, *([f'LICENSE """{notice}"""'] if notice else [])]) + "\n"
