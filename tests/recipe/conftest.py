"""A folder of one's own with recipes in it, and what loading them says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_ft.errors import RecipeError
from gemma_ft.recipe.load import load_recipe

GOOD = """\
output_dir: runs/my
strategy: qlora
data: {train: my.jsonl}
model: {preset: gemma-2-2b}
adapter: {rank: 8}
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a recipe below an empty current directory; the path is relative, as a user would give it."""
    monkeypatch.chdir(tmp_path)

    def write_one(text: str | bytes = GOOD, name: str = "my.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_one


def refusal(path: str | Path, *overrides: str) -> list[str]:
    """The lines of the error that loading a recipe raises."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")
