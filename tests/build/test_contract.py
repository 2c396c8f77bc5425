"""The contract between training and serving: written with what is trained, kept to or refused by who serves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gemma_ft.build.contract import CONTRACT, Contract, asking_encoder, contract_of, sha256_of
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.families.chat_template import SYSTEM_POLICIES, TURNS, SystemPolicy

TINY = Path(__file__).resolve().parents[2] / "data" / "gemma-tiny"


def saved(folder: Path, policy: SystemPolicy = "fold", **facts: object) -> Contract:
    folder.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(str(TINY))
    save_tokenizer(tokenizer, folder, system_policy=policy)
    contract = contract_of(ChatEncoder(tokenizer, policy), **facts)
    contract.write(folder)
    return contract


def serve(folder: Path) -> ChatEncoder:
    contract = Contract.read(folder)
    assert contract is not None
    return contract.encoder(load_tokenizer(str(folder)), folder)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        serve(folder)
    return str(caught.value).replace(str(folder), "FOLDER")


def change(folder: Path, **values: object) -> None:
    path = folder / CONTRACT
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("policy", SYSTEM_POLICIES)
def test_what_is_written_is_read_and_served(tmp_path: Path, policy: SystemPolicy) -> None:
    contract = saved(tmp_path, policy, base="google/gemma-2b", quantize="nf4", double_quant=False)
    assert Contract.read(tmp_path) == contract
    encoder = contract.encoder(load_tokenizer(str(tmp_path)), tmp_path)
    assert encoder.system_policy == policy


# Of a contract that the build before wrote: SHA-256 of its chat templates, which had no marks of what is trained.
FORMER: dict[SystemPolicy, str] = {
    "fold": "42b5b9f53e8342f672747f2237e89eca180914e90a08ab3be320d54cae0f24fa",
    "error": "0d4096f1b1d7882ecf23efe32375411da8a4b162baa116b662633e292cedc679",
    "drop": "58325e79fe00d78a1c2a6c7f154b26758bb0974853a1230ae101421c31b45fd1",
}


@pytest.mark.parametrize("policy", SYSTEM_POLICIES)
def test_what_the_build_before_wrote_is_served(tmp_path: Path, policy: SystemPolicy) -> None:
    """Its template file and its hash, in a folder; the ids are the same, and what is written anew keeps the hash."""
    saved(tmp_path, policy)
    template = tmp_path / "chat_template.jinja"
    template.write_text(TURNS.text(policy, marked=False))
    assert sha256_of(template.read_text()) == FORMER[policy]
    change(tmp_path, template_sha256=FORMER[policy])
    encoder = serve(tmp_path)
    assert contract_of(encoder) == Contract.read(tmp_path)
    turns = [Turn("user", " Hi? "), Turn("assistant", "Yes."), Turn("user", "So?")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    stock = AutoTokenizer.from_pretrained(str(tmp_path)).apply_chat_template(messages, add_generation_prompt=True)
    assert encoder.encode_prompt(turns) == stock["input_ids"]
    anew = tmp_path / "anew"  # as a merge or an export writes it
    anew.mkdir()
    save_tokenizer(load_tokenizer(str(tmp_path)), anew, system_policy=policy)
    contract_of(encoder).write(anew)
    assert "{% generation %}" in (anew / "chat_template.jinja").read_text()
    assert serve(anew).template_hash == FORMER[policy]


def test_a_template_of_the_build_before_under_another_policy_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TURNS.text("drop", marked=False))
    assert refusal(tmp_path).startswith("FOLDER: its chat template is not the one that was trained (gemma_ft.json)")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 6, 50, 51]}, {"eos_token_id": 7}, [1, 6, 50, 51]),
        ({"eos_token_id": 8}, {}, [1, 6, 8]),
        ({"do_sample": True}, {"eos_token_id": 7}, [1, 6]),
        (None, {"eos_token_id": [7, 1]}, [1, 6, 7]),
    ],
)
def test_answers_end_at_the_stop_ids_of_contract_and_folder(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: list[int]
) -> None:
    """transformers 5.24 reads them from generation_config.json, and from config.json where there is none."""
    contract = saved(tmp_path)
    told = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    encoder = asking_encoder(load_tokenizer(str(tmp_path)), tmp_path, contract, tmp_path)
    assert encoder.stop_ids == expected


def test_no_contract_is_none_and_later_fields_do_no_harm(tmp_path: Path) -> None:
    assert Contract.read(tmp_path) is None
    contract = saved(tmp_path)
    change(tmp_path, a_field_of_tomorrow=1)
    assert Contract.read(tmp_path) == contract


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stop_ids": [1]}'])
def test_a_damaged_contract_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / CONTRACT).write_text(text)
    found = refusal(tmp_path)
    assert found.startswith("FOLDER/gemma_ft.json: ")
    assert found.endswith("damaged; restore it from where the model was trained")


@pytest.mark.parametrize(
    ("key", "value"),
    [("base_sha256", 5), ("stop_ids", [1, "a"]), ("quantize", "bogus"), ("double_quant", "no"), ("system", "bogus")],
)
def test_a_field_of_another_kind_is_named(tmp_path: Path, key: str, value: object) -> None:
    saved(tmp_path)
    change(tmp_path, **{key: value})
    assert refusal(tmp_path) == f"FOLDER/gemma_ft.json: {key}: damaged; restore it from where the model was trained"


def test_another_bos_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, bos="never")
    assert refusal(tmp_path) == ("FOLDER: trained with BOS 'never' (gemma_ft.json), which this version cannot serve")


def test_another_template_is_refused(tmp_path: Path) -> None:
    expected = (
        "FOLDER: its chat template is not the one that was trained (gemma_ft.json); "
        "restore the tokenizer files that were saved with it"
    )
    saved(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("model", "assistant"))
    assert refusal(tmp_path) == expected
    saved(tmp_path, "drop")
    change(tmp_path, system="fold")  # the files still say drop
    assert refusal(tmp_path) == expected
    saved(tmp_path)
    save_tokenizer(load_tokenizer(str(TINY)), tmp_path, system_policy="error")
    assert refusal(tmp_path) == expected


def test_other_stop_ids_and_another_vocabulary_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, stop_ids=[1])
    assert refusal(tmp_path) == (
        "FOLDER: stop ids [1, 6], but trained with [1]; restore the tokenizer files that were saved with it"
    )


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("tokenizer.json", lambda spec: spec["model"]["merges"].pop(), "vocabulary"),
        ("tokenizer.json", lambda spec: spec["model"]["vocab"].update(x=len(spec["model"]["vocab"])), "vocabulary"),
        ("tokenizer.model", None, "tokenizer.model"),
    ],
    ids=["merges", "vocabulary", "pieces"],
)
def test_another_tokenizer_is_refused(
    tmp_path: Path, name: str, damage: Callable[[dict[str, Any]], object] | None, what: str
) -> None:
    saved(tmp_path)
    assert serve(tmp_path).content.encode("Hello")
    path = tmp_path / name
    if damage is None:
        path.write_bytes(b"")
    else:
        spec = json.loads(path.read_text())
        damage(spec)
        path.write_text(json.dumps(spec))
    assert refusal(tmp_path) == (
        f"FOLDER: its {what} is not the one that was trained (gemma_ft.json); "
        "restore the tokenizer files that were saved with it"
    )


def test_without_the_pieces_it_is_served_all_the_same(tmp_path: Path) -> None:
    """What transformers saves has no tokenizer.model; tokenizer.json decides."""
    saved(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    assert serve(tmp_path).content.encode("Hello")
