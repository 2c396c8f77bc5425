"""The contract between training and serving: written with what is trained, kept to or refused by who serves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.contract import CONTRACT, Contract, contract_of
from gemma_ft.data.chat import ChatEncoder
from gemma_ft.data.template import SYSTEM_POLICIES, SystemPolicy
from gemma_ft.data.tokenizer import load_tokenizer
from gemma_ft.data.tokenizer_files import save_tokenizer
from gemma_ft.errors import UserError

TINY = Path(__file__).resolve().parents[1] / "data" / "gemma-tiny"


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
