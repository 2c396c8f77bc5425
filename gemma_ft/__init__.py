"""gemma-ft: fine-tune Google's Gemma on your own data. The public names load torch only when they are used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_ft.build.pretrained import load_model as load_model
    from gemma_ft.build.pretrained import load_tokenizer as load_tokenizer
    from gemma_ft.model.gemma import GemmaForCausalLM as GemmaForCausalLM

__version__ = "0.1.0"
__all__ = ["GemmaForCausalLM", "__version__", "load_model", "load_tokenizer"]

_HOMES = {
    "GemmaForCausalLM": "gemma_ft.model.gemma",
    "load_model": "gemma_ft.build.pretrained",
    "load_tokenizer": "gemma_ft.build.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gemma_ft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
