"""The tiny tokenizer, encoders of each policy, and the real data files where a checkout has them beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer

REPO_ROOT = Path(__file__).resolve().parents[2]
TINY = REPO_ROOT / "data" / "gemma-tiny"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(str(TINY))


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="session")
def encoders(tokenizer: Any) -> dict[str, ChatEncoder]:
    return {policy: ChatEncoder(tokenizer, policy) for policy in ("fold", "error", "drop")}


@pytest.fixture
def real_data() -> Callable[[str], str]:
    def find(name: str) -> str:
        path = REPO_ROOT.parent / "shared" / "data" / name
        if not path.is_file():
            pytest.skip(f"the real data file {name} is not beside this checkout")
        return str(path)

    return find


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | bytes], str]:
    """Writes a file in the current directory and gives its name, so that messages hold no path of this machine."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> str:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write
