"""An adapter of another tool is scored in the chat template that it was tuned on."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_ft.data.conversation import Turn
from gemma_ft.errors import UserError
from gemma_ft.evaluate.harness_model import NativeLM
from gemma_ft.evaluate.models import ModelsToCompare, find_models
from tests.foreign import IM_END, TEMPLATES, save_foreign, save_foreign_adapter

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign(tmp_path_factory.mktemp("foreign") / "base", stop_ids=(1, 6, 50))


def subject_of(base: Path, out: Path, adapter: Path | None = None) -> ModelsToCompare:
    overrides = [f"model.weights={base}", f"output_dir={out}", "~model.preset"]
    return find_models("sft_tiny", [] if adapter is not None else overrides, adapter=adapter)


@pytest.mark.parametrize("name", ["ChatML with BOS, stripped", "Llama 3's headers"])
def test_an_adapter_without_a_contract_is_scored_in_its_own_template(tmp_path: Path, base: Path, name: str) -> None:
    """As transformers 5.24's apply_chat_template writes it, in rows and in the harness's chats."""
    adapter = save_foreign_adapter(tmp_path / "adapter", base, TEMPLATES[name])
    subject = subject_of(base, tmp_path / "run", adapter)
    tokenizer = subject.tokenizer()
    encoder = subject.encoder(tokenizer, subject.recipe.data)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert encoder.encode_prompt([Turn("system", "Be brief."), Turn("user", "Hi")]) == expected
    lm = NativeLM(None, encoder, batch_size=1, max_length=64)
    assert lm.tok_encode(lm.apply_chat_template(CHAT)) == expected
    assert encoder.stop_ids[2:] == [6, 50]  # its base's


def test_a_template_without_bos_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = save_foreign_adapter(tmp_path / "adapter", base, TEMPLATES["ChatML"])
    subject = subject_of(base, tmp_path / "run", adapter)
    with pytest.raises(UserError) as raised:
        subject.encoder(subject.tokenizer(), subject.recipe.data)
    assert str(raised.value) == (
        f"{adapter}: its chats begin without BOS, and rows are scored with one; ask it by generate"
    )


def test_an_adapter_of_our_own_is_scored_as_it_was_trained(tmp_path: Path, base: Path) -> None:
    adapter = save_foreign_adapter(tmp_path / "adapter", base, contract=True)
    subject = subject_of(base, tmp_path / "run", adapter)
    encoder = subject.encoder(subject.tokenizer(), subject.recipe.data)
    assert encoder.format.name == "Gemma's turns"
    assert encoder.stop_ids == [1, 6, 50]
    assert IM_END not in encoder.stop_ids
