"""Under which terms tuned weights may be passed on: Google's for what was made from Gemma, none of theirs for what was
not.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.build.contract import Contract
from gemma_ft.families.records import FAMILIES, PRESETS, TINY

POLICY_URL = "https://ai.google.dev/gemma/prohibited_use_policy"
APACHE_URL = "https://www.apache.org/licenses/LICENSE-2.0"
# The sentence that section 3.1 of the Gemma Terms of Use asks for, word by word, in a text file named "Notice".
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


@dataclass(frozen=True)
class License:
    """What a model card, a NOTICE file and a GGUF file say of the terms. `license`: the hub's id and a link."""

    license: tuple[str, str] | None
    notice: str | None
    section: str  # of the model card, in Markdown


def license_of(config: PreTrainedConfig, contract: Contract | None) -> License:
    """The terms of weights of this shape and origin. Weights whose origin is not known are taken for Gemma's.

    Source: Gemma Terms of Use, section 3.1 (Distribution and Redistribution) and 3.2 (Use Restrictions).
    """
    if is_tiny(config):
        return License(
            ("apache-2.0", APACHE_URL),
            None,
            f"The base, {TINY}, was made from random weights and synthetic text for gemma-ft, and is under the "
            f"[Apache License 2.0]({APACHE_URL}). It holds no weights of Google's Gemma, whose terms do not apply.",
        )
    if contract is not None and contract.base is None:
        return License(
            None,
            None,
            "Trained from fresh weights: it holds no weights of Google's Gemma, whose terms do not apply. "
            "Its license is for whoever trained it to choose; name it here.",
        )
    license = FAMILIES[config.model_type].license
    return License(
        license,
        f"{GEMMA_NOTICE}\n\n"
        "The weights in this folder are not Google's: they were made from Gemma's and modified by fine-tuning.\n"
        f"Whoever uses or passes them on is bound by these terms and by the Prohibited Use Policy, {POLICY_URL}\n",
        f"{GEMMA_NOTICE}.\n\n"
        "These weights are a derivative of Gemma, modified by fine-tuning. Using them is bound to the "
        f"[Gemma Terms of Use]({license[1]}) and its [Prohibited Use Policy]({POLICY_URL}) (section 3.2). Whoever "
        "passes them on passes on those restrictions, a copy of the terms, the file `NOTICE`, and a word on what was "
        "changed (section 3.1).",
    )


def is_tiny(config: PreTrainedConfig) -> bool:
    """Whether a config has the shape of the tiny Gemma that ships with the project: no weights of Google's fit it."""
    return all(getattr(config, key, None) == value for key, value in PRESETS[TINY].fields.items())
