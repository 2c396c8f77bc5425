"""The forms of an export by name, and what each is called elsewhere. It imports nothing: the command line reads it."""

from dataclasses import dataclass
from typing import Literal

FormName = Literal["hf", "adapter", "gguf"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]  # how a GGUF file stores its matrices


@dataclass(frozen=True)
class FormFacts:
    """What a model card says of a form. library, relation: the hub's words for them (to the base)."""

    library: str
    relation: str
    what: str


FORMS: dict[FormName, FormFacts] = {
    "hf": FormFacts("transformers", "finetune", "The whole model"),
    "adapter": FormFacts("peft", "adapter", "An adapter, to be put on the base"),
    "gguf": FormFacts("gguf", "quantized", "One GGUF file"),
}
