"""The model card: what a reader must know is in it, what only this machine knows is not, and whose terms hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from gemma_ft.build.contract import Contract
from gemma_ft.export.card.license import GEMMA_NOTICE, terms_of
from gemma_ft.export.card.model_card import Card
from gemma_ft.export.card.run_record import RunRecord, public
from gemma_ft.model.config import PRESETS
from gemma_ft.recipe.load import load_recipe, parse_recipe

CONTRACT = Contract("a" * 64, "b" * 64, [1, 107], "fold", base="google/gemma-2-2b", revision="c" * 40)
RECIPE = parse_recipe(
    {
        "output_dir": "/home/me/runs/x",
        "strategy": "qlora",
        "data": {"train": "tatsu-lab/alpaca", "eval": "/home/me/data/held_out.jsonl"},
        "model": {"preset": "gemma-2-2b"},
        "adapter": {},
    }
)
SUMMARY = {
    "data": {"rows": 2000, "tokens": 144039, "trained_tokens": 74731, "truncated": 3},
    "eval_before": {"loss": 2.0874319, "exact_match": 0.0},
    "eval_after": {"loss": 0.0011287, "exact_match": 1.0},
}
EVALUATION = {
    "rows": 100,
    "models": {
        "base": {"loss": {"value": 2.5, "low": 2.25, "high": 2.75, "rows": 100}},
        "adapter": {"loss": {"value": 0.125, "low": 0.1, "high": 0.15, "rows": 100}, "exact_match": {"value": 1.0}},
    },
}
MERGE = {
    "policy": "original", "dtype": "bfloat16", "changed": 42, "tensors": 68,
    "certificate": {"merged": {"mean_kl": 0.00013, "top1_agreement": 1.0}, "passed": True, "prompts": 32,
                    "rows": "random tokens: /home/me/data/held_out.jsonl: no such file",
                    "limit": {"measure": "mean_kl", "at_most": 0.1, "why": "trained over quantized weights"}},
}  # fmt: skip


def card(form: Any = "hf", *, preset: str = "gemma-2-2b", **facts: Any) -> Card:
    config, contract = PRESETS[preset].config(), facts.pop("contract", CONTRACT)
    return Card(
        name="me/my-gemma",
        form=form,
        config=config,
        contract=contract,
        terms=terms_of(config, contract),
        record=RunRecord(**{"recipe": None, "summary": None, "evaluation": None, "merge": None, **facts}),
        base=contract.base if contract else None,
        file="my-gemma-q8_0.gguf",
    )


def front(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "models",
    [{"base": EVALUATION["models"]["base"], "z": 5}, 5, {"base": {"loss": 5}}],  # type: ignore[index]
)
def test_damaged_records_are_passed_over(models: Any) -> None:
    text = card(evaluation={"models": models}, merge={"certificate": {"merged": 5, "limit": [1]}}).text()
    assert text.startswith("---\n")


def test_a_whole_card() -> None:
    text = card(recipe=RECIPE, summary=SUMMARY, merge=MERGE).text()
    assert front(text) == {
        "base_model": "google/gemma-2-2b",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "gemma",
        "datasets": ["tatsu-lab/alpaca"],
        "tags": ["gemma2", "gemma-ft", "qlora"],
    }
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# my-gemma", "## Training data", "## Results", "## Merge certificate", "## Use", "## How chats must be served",
        "## Recipe", "## Terms of use",
    ]  # fmt: skip
    for line in (
        f"The whole model: Gemma 2, tuned from `google/gemma-2-2b` (QLoRA) with gemma-ft. Base revision: `{'c' * 40}`.",
        "| trained on | `tatsu-lab/alpaca`: 2,000 rows, 144,039 tokens, 74,731 trained tokens, 3 rows cut |",
        "| held out | `held_out.jsonl` |",
        "| loss | 2.087 | 0.001129 |",
        "| mean kl | 0.00013 |",
        "| passed | yes |",
        "| an answer ends at | token ids 1, 107 |",
        'model = AutoModelForCausalLM.from_pretrained("me/my-gemma", dtype="auto")',
        "Or `gemma-ft chat me/my-gemma`, `gemma-ft serve me/my-gemma`, `vllm serve me/my-gemma`.",
        "output_dir: x",
    ):
        assert line in text.splitlines(), line


def test_nothing_private_is_in_it() -> None:
    secret = MERGE | {"policy": "hf_abcdefghijklmnopqrstuvwxyz"}
    text = card(recipe=RECIPE, summary=SUMMARY, merge=public(secret)).text()
    assert "/home" not in text
    assert "hf_abc" not in text
    assert "[secret]" in text
    assert "random tokens: held_out.jsonl: no such file" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/x.jsonl", "x.jsonl"),
        ("~/data/x/", "x"),
        ("../up/x", "x"),
        ("C:\\me\\x.jsonl", "x.jsonl"),
        ("data/x.jsonl", "data/x.jsonl"),
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("see https://huggingface.co/a/b or /etc/x, then and/or", "see https://huggingface.co/a/b or x, then and/or"),
        ("1 / 2", "1 / 2"),
    ],
)
def test_what_becomes_of_a_path(text: str, expected: str) -> None:
    assert public({"a": [text]}) == {"a": [expected]}


def test_an_evaluation_replaces_the_runs_own_figures() -> None:
    text = card(summary=SUMMARY, evaluation=EVALUATION).text()
    assert "On held-out rows; in brackets the 95% confidence interval." in text
    assert "|  | base | adapter |" in text
    assert "| loss | 2.5 [2.25, 2.75] | 0.125 [0.1, 0.15] | 100 |" in text
    assert "| exact_match |  | 1 |" in text
    assert "2.087" not in text


def test_a_card_of_which_nothing_is_known_still_says_whose_terms_hold() -> None:
    text = card(contract=None).text()
    assert "license: gemma" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Use", "## Terms of use"]
    assert GEMMA_NOTICE in text


@pytest.mark.parametrize(("form", "library"), [("hf", "transformers"), ("adapter", "peft"), ("gguf", "gguf")])
def test_each_form_says_how_it_is_used(form: str, library: str) -> None:
    text = card(form).text()
    assert front(text)["library_name"] == library
    word = {"hf": "AutoModelForCausalLM", "adapter": "AutoPeftModelForCausalLM", "gguf": "my-gemma-q8_0.gguf"}[form]
    assert word in text.partition("## Use")[2].partition("##")[0]


def test_the_terms_are_gemmas_only_for_what_was_made_from_gemma() -> None:
    config = PRESETS["gemma-2-2b"].config()
    of_gemma = terms_of(config, CONTRACT)
    assert of_gemma.license == ("gemma", "https://ai.google.dev/gemma/terms")
    assert of_gemma.notice is not None
    assert of_gemma.notice.splitlines()[0] == (
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    )
    assert "https://ai.google.dev/gemma/prohibited_use_policy" in of_gemma.section
    assert terms_of(config, None) == of_gemma
    fresh = terms_of(config, replace(CONTRACT, base=None))
    assert (fresh.license, fresh.notice) == (None, None)
    tiny = terms_of(PRESETS["gemma-tiny"].config(vocab_size=2048), replace(CONTRACT, base="gemma-tiny"))
    assert (tiny.license, tiny.notice) == (("apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"), None)
    for other in (fresh, tiny):
        assert "whose terms do not apply" in other.section
        assert "ai.google.dev" not in other.section


def test_the_recipe_of_the_card_can_be_trained_again() -> None:
    from tests.export.tuned import ROOT

    recipe = load_recipe(ROOT / "recipes" / "sft_tiny.yaml").recipe
    text = card(recipe=recipe).text()
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == recipe.model_dump(mode="json")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"data": {"train": "/home/O'Neil, me/my rows.jsonl"}}, {"data": {"train": "my rows.jsonl"}}),
        (
            {"data": {"train": [{"path": "/home/O'Neil, me/my rows.jsonl"}]}},
            {"data": {"train": [{"path": "my rows.jsonl"}]}},
        ),
        ({"rows": "10.0% of /home/O'Neil, me/a b/my rows.jsonl"}, {"rows": "10.0% of my rows.jsonl"}),
        ({"rows": "data/a.jsonl, /home/me too/b.jsonl, ~/my c/d.jsonl"}, {"rows": "data/a.jsonl, d.jsonl"}),
        ({"rows": "owner/name, data/my rows.jsonl"}, {"rows": "owner/name, data/my rows.jsonl"}),
        ({"model": {"weights": "C:\\my files\\w"}}, {"model": {"weights": "w"}}),
        ({"certificate": {"rows": "a b/../c d/x y.jsonl"}}, {"certificate": {"rows": "x y.jsonl"}}),
        ({"certificate": {"rows": "random tokens: /a/b: gone"}}, {"certificate": {"rows": "random tokens: b: gone"}}),
        ({"data": {"train": "data/my rows.jsonl"}}, {"data": {"train": "data/my rows.jsonl"}}),
        ("see file:///home/me/x.jsonl", "see x.jsonl"),
        ("https://me:pass@host.org/a", "https://host.org/a"),
        ("AKIA" + "A1" * 8, "[secret]"),
        ("glpat-" + "a" * 20, "[secret]"),
        ("github_pat_" + "a" * 22, "[secret]"),
    ],
)
def test_nothing_of_this_machine_is_left_of_a_value(value: Any, expected: Any) -> None:
    assert public(value) == expected


def test_a_folder_of_the_users_is_no_data_set_of_the_hub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats" / "may").mkdir(parents=True)
    sources = ["tatsu-lab/alpaca", "openai/gsm8k:main", "chats/may", "data/chats.jsonl", "../up", "s3://b/x.jsonl"]
    recipe = parse_recipe(RECIPE.model_dump() | {"data": {"train": sources}})
    text = card(recipe=recipe).text()
    assert front(text)["datasets"] == ["openai/gsm8k", "tatsu-lab/alpaca"]
    assert (
        "| trained on | `tatsu-lab/alpaca, openai/gsm8k:main, chats/may, data/chats.jsonl, up, s3://b/x.jsonl` |"
        in text
    )
    assert "| held out | `none` |" in text
