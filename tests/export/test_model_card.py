"""The model card: what a reader must know is in it, what only this machine knows is not, and whose terms hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_ft.build.contract import Contract
from gemma_ft.build.place import place_of
from gemma_ft.export.card.license import GEMMA_NOTICE, license_of
from gemma_ft.export.card.model_card import Card
from gemma_ft.export.card.run_record import RunRecord, public, read_record
from gemma_ft.families.records import PRESETS
from gemma_ft.recipe.load import load_recipe
from gemma_ft.train.run_dir import RunDir

CONTRACT = Contract("a" * 64, "b" * 64, [1, 107], "fold", base="google/gemma-2-2b", revision="c" * 40)
# The folder of a user, with all that a path may hold, and rows in it.
MINE = "/home/O'Neil, me/secret project/my rows.jsonl"
ON_HUB = "tatsu-lab/alpaca"

MERGED = "merged"

Runs = Callable[..., RunDir]


@pytest.fixture
def run_of(finished_run: Path, tmp_path: Path) -> Runs:
    """Copies of a run that was trained, evaluated and merged, whose recipe had other settings."""

    def make(*overrides: str) -> RunDir:
        run = RunDir(tmp_path / "run")
        shutil.copytree(finished_run, run.root, ignore=shutil.ignore_patterns("checkpoints"))
        run.write_recipe(load_recipe(run.recipe, [f"output_dir={run.root}", *overrides]).recipe)
        return run

    return make


def card(form: Any = "hf", *, preset: str = "gemma-2-2b", run: Path | None = None, **facts: Any) -> Card:
    """The card of a model of that size; `run`: whose files, and those of its merged folder, tell how it was made."""
    config, contract = PRESETS[preset].config(), facts.pop("contract", CONTRACT)
    record = read_record(place_of(run / MERGED)) if run is not None else RunRecord(None, None, None, None)
    return Card(
        name="me/my-gemma",
        form=form,
        config=config,
        contract=contract,
        terms=license_of(config, contract),
        record=replace(record, **facts),
        base=contract.base if contract else None,
        file="my-gemma-q8_0.gguf",
    )


def said(path: Path) -> Any:
    return json.loads(path.read_text())


def front(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("models", "line"),
    [({"z": 5}, "| held-out | before | after |"), (5, "| held-out | before | after |"),
     ({"base": {"loss": 5}}, "| loss | 5 |  |")],
)  # fmt: skip
def test_damaged_records_are_passed_over(models: Any, line: str, run_of: Runs) -> None:
    """What can be read is told; where nothing of an evaluation can be, the run's own figures stand."""
    run = run_of()
    run.eval_results.write_text(json.dumps({**said(run.eval_results), "models": models}))
    merge = run.root / MERGED / run.certificate.name
    merge.write_text(json.dumps({**said(merge), "certificate": {"merged": 5, "limit": [1]}}))
    text = card(run=run.root).text()
    assert front(text)["library_name"] == "transformers"
    assert line in text.splitlines()
    assert "| policy | original |" in text
    assert "mean kl" not in text


def test_a_gemma_3_has_its_name_and_terms() -> None:
    """Its turns end at 106; 107 is another token there."""
    contract = replace(CONTRACT, base="google/gemma-3-270m", stop_ids=[1, 106])
    text = card("gguf", preset="gemma-3-270m", contract=contract).text()
    assert {key: front(text)[key] for key in ("base_model", "license", "tags")} == {
        "base_model": "google/gemma-3-270m", "license": "gemma", "tags": ["gemma3_text", "gemma-ft"],
    }  # fmt: skip
    assert "One GGUF file: Gemma 3, tuned from `google/gemma-3-270m` with gemma-ft." in text
    assert "| an answer ends at | token ids 1, 106 |" in text.splitlines()
    assert "https://ai.google.dev/gemma/terms" in text


def test_a_whole_card(run_of: Runs) -> None:
    run = run_of(f"data.train={ON_HUB}", f"data.eval={MINE}", "strategy=qlora", "model.preset=gemma-2-2b")
    run.eval_results.unlink()
    text = card(run=run.root).text()
    assert front(text) == {
        "base_model": "google/gemma-2-2b",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "gemma",
        "datasets": [ON_HUB],
        "tags": ["gemma2", "gemma-ft", "qlora"],
    }
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# my-gemma", "## Training data", "## Results", "## Merge certificate", "## Use", "## How chats must be served",
        "## Recipe", "## Terms of use",
    ]  # fmt: skip
    summary, merge = said(run.summary), said(run.certificate)
    data, before, after = summary["data"], summary["eval_before"]["loss"], summary["eval_after"]["loss"]
    counts = f"{data['rows']:,} rows, {data['tokens']:,} tokens, {data['trained_tokens']:,} trained tokens"
    assert data["rows"] == 200, "the recipe's own"
    assert data["tokens"] > 1000, "with a comma"
    for line in (
        f"The whole model: Gemma 2, tuned from `google/gemma-2-2b` (QLoRA) with gemma-ft. Base revision: `{'c' * 40}`.",
        f"| trained on | `{ON_HUB}`: {counts} |",
        "| held out | `my rows.jsonl` |",
        f"| loss | {before:.4g} | {after:.4g} |",
        f"| mean kl | {merge['certificate']['merged']['mean_kl']:.4g} |",
        f"| tensors changed | {merge['changed']} of {merge['tensors']} |",
        "| passed | yes |",
        "| an answer ends at | token ids 1, 107 |",
        'model = AutoModelForCausalLM.from_pretrained("me/my-gemma", dtype="auto")',
        "Or `gemma-ft chat me/my-gemma`, `gemma-ft serve me/my-gemma`, `vllm serve me/my-gemma`.",
        "output_dir: run",
    ):
        assert line in text.splitlines(), line


def test_nothing_private_is_in_it(run_of: Runs) -> None:
    """Neither of the recipe, nor of what a certificate says of rows that are gone."""
    run = run_of(f"data.train={MINE}", f"data.eval={MINE}")
    merge = run.root / MERGED / run.certificate.name
    facts = said(merge)
    facts["certificate"]["rows"] = f"random tokens: {MINE}: no such file"
    facts["policy"] = "hf_abcdefghijklmnopqrstuvwxyz"
    merge.write_text(json.dumps(facts))
    text = card(run=run.root, merge=public(said(merge))).text()
    assert "/home" not in text
    assert "Neil" not in text
    assert str(run.root.parent) not in text
    assert "hf_abc" not in text
    assert "[secret]" in text
    assert "random tokens: my rows.jsonl: no such file" in text


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


def test_an_evaluation_replaces_the_runs_own_figures(run_of: Runs) -> None:
    run = run_of()
    results = said(run.eval_results)
    del results["models"]["base"]["exact_match"]
    run.eval_results.write_text(json.dumps(results))
    text = card(run=run.root).text()

    def cell(model: str, metric: str) -> str:
        value, low, high = (results["models"][model][metric][key] for key in ("value", "low", "high"))
        return f"{value:.4g} [{low:.4g}, {high:.4g}]"

    source = results["settings"]["data"]
    assert f"On held-out rows of `{source}`; in brackets the 95% confidence interval." in text
    assert "|  | base | adapter | merged | rows |" in text
    losses = " | ".join(cell(model, "loss") for model in ("base", "adapter", "merged"))
    assert f"| loss | {losses} | {results['rows']} |" in text
    assert f"| exact_match |  | {cell('adapter', 'exact_match')} | {cell('merged', 'exact_match')} | 2 |" in text
    assert "| held-out | before | after |" not in text


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
    of_gemma = license_of(config, CONTRACT)
    assert of_gemma.license == ("gemma", "https://ai.google.dev/gemma/terms")
    assert of_gemma.notice is not None
    assert of_gemma.notice.splitlines()[0] == (
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    )
    assert "https://ai.google.dev/gemma/prohibited_use_policy" in of_gemma.section
    assert license_of(config, None) == of_gemma
    fresh = license_of(config, replace(CONTRACT, base=None))
    assert (fresh.license, fresh.notice) == (None, None)
    tiny = license_of(PRESETS["gemma-tiny"].config(vocab_size=2048), replace(CONTRACT, base="gemma-tiny"))
    assert (tiny.license, tiny.notice) == (("apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"), None)
    for other in (fresh, tiny):
        assert "whose terms do not apply" in other.section
        assert "ai.google.dev" not in other.section


def test_the_recipe_of_the_card_can_be_trained_again(run_of: Runs) -> None:
    """All of it, but for where it lies: the same settings, as they are read from the card's own text."""
    run = run_of("eval.canary=data/canary.jsonl", "model.weights=data/gemma-tiny")
    (run.root / "card.yaml").write_text(card(run=run.root).text().split("```yaml\n")[1].split("```")[0])
    found = load_recipe(run.root / "card.yaml").recipe
    assert found.output_dir == "run"
    assert found.model_copy(update={"output_dir": str(run.root)}) == load_recipe(run.recipe).recipe


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


def test_a_folder_of_the_users_is_no_data_set_of_the_hub(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats" / "may").mkdir(parents=True)
    sources = ["tatsu-lab/alpaca", "openai/gsm8k:main", "chats/may", "data/chats.jsonl", "../up", "s3://b/x.jsonl"]
    run = run_of(f"data.train={json.dumps(sources)}", "data.eval=null")
    text = card(run=run.root).text()
    assert front(text)["datasets"] == ["openai/gsm8k", "tatsu-lab/alpaca"]
    assert (
        "| trained on | `tatsu-lab/alpaca, openai/gsm8k:main, chats/may, data/chats.jsonl, up, s3://b/x.jsonl`: 200 "
        "rows, " in text
    )
    assert "| held out | `none` |" in text
