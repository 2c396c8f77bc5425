"""Each file of a checkpoint and of an adapter, missing, empty, cut or with one bit flipped: seen, and gone round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.errors import UserError
from gemma_ft.system.files import fault_of
from tests.faults.conftest import Runs, outcome
from tests.forked import fork

DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


# What changes nothing: a tokenizer without a template gets the one that was trained, tokenizer.json decides, and
# tokenizer.model alone is the same tokenizer: the hash of the contract holds vocabulary, merges, added tokens to it.
HARMLESS = {"chat_template.jinja missing", "chat_template.jinja empty", "tokenizer.model missing",
            "tokenizer.json missing"}  # fmt: skip


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture(scope="module")
def run(runs: Runs) -> Path:
    out = runs.place()
    codes, said = runs.go(out)
    assert codes == [0], said
    return out


def test_any_damage_to_a_checkpoint_is_seen(run: Path, tmp_path: Path, figure: Callable[..., None]) -> None:
    newest = max((run / "checkpoints").iterdir())
    names = sorted(path.name for path in newest.iterdir())
    unseen = []
    for name in names:
        for what, damage in DAMAGE.items():
            copy = tmp_path / f"{name}-{what}"
            shutil.copytree(newest, copy)
            assert fault_of(copy) is None
            damage(copy / name)
            unseen += [f"{name} {what}"] if fault_of(copy) is None else []
    assert unseen == []
    figure(files=len(names), damages=len(names) * len(DAMAGE), unseen=0)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_resume_goes_round_a_damaged_checkpoint(
    run: Path, runs: Runs, reference: tuple[Any, bytes], what: str
) -> None:
    for name in ("weights-00000.safetensors", "manifest.json"):
        out = runs.place()
        shutil.copytree(run, out)
        (out / "summary.json").unlink()
        newest = max((out / "checkpoints").iterdir())
        DAMAGE[what](newest / name)
        words = runs.words(out, "--resume")
        text = (out / "recipe.yaml").read_text().replace(str(run), str(out))
        (out / "recipe.yaml").write_text(text)
        codes, said = runs.go(out, "--resume")
        assert codes == [0], (words, said)
        assert f"set aside as {newest.name}.damaged" in said.replace("\n", "")
        assert outcome(out) == reference


def test_two_ranks_go_round_it_as_one(run: Path, runs: Runs) -> None:
    out = runs.place()
    shutil.copytree(run, out)
    (out / "summary.json").unlink()
    text = (out / "recipe.yaml").read_text().replace(str(run), str(out))
    (out / "recipe.yaml").write_text(text)
    newest = max((out / "checkpoints").iterdir())
    DAMAGE["cut"](newest / "weights-00000.safetensors")
    codes, said = runs.go(out, "--resume", ranks=2, layout="fsdp2")
    assert codes == [0, 0], said
    assert said.replace("\n", "").count(f"set aside as {newest.name}.damaged") == 1


def test_any_damage_to_an_adapter_is_refused(run: Path, tmp_path: Path, figure: Callable[..., None]) -> None:
    """All that decides what it says; the card of the base, and what transformers writes for itself, do not."""
    kept = {"tokenizer_config.json", "README.md"}
    names = sorted(path.name for path in (run / "adapter").iterdir() if path.name not in kept)

    def look() -> int:
        from gemma_ft.infer.session import open_session

        unseen = []
        for name in names:
            for what, damage in DAMAGE.items():
                copy = tmp_path / f"{name}-{what}"
                shutil.copytree(run / "adapter", copy)
                damage(copy / name)
                try:
                    if not open_session(copy).notes:
                        unseen.append(f"{name} {what}")
                except UserError as error:
                    if "\n" in str(error):
                        unseen.append(f"{name} {what}: {error}")
        print(unseen)
        return len(set(unseen) ^ HARMLESS)

    child = fork(look, tmp_path / "said.txt")
    assert child.wait() == 0, child.said
    figure(files=len(names), damages=len(names) * len(DAMAGE), harmless=len(HARMLESS), unseen=0)
