"""What the version before wrote is opened by this one: recipe, run, checkpoint, adapter, cached rows; its GGUF is ours.

`fixtures/version_before.tar.xz` was written by gemma-ft at commit 4b90fae: six steps over 24 rows, the same run
stopped by SIGTERM after its third, the cache of its rows, and `facts.json` with what that version made. The path
of the base is a placeholder; tokenizer files that ship with the project are not in it again.
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from gemma_ft import load_model
from gemma_ft.cli.app import main
from gemma_ft.recipe.load import load_recipe
from gemma_ft.system.hardware import cpu_flags
from tests.cli.test_run import run

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "gemma-tiny"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which the version before worked, as the current directory."""
    with tarfile.open(Path(__file__).parent / "fixtures" / "version_before.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    for name in ("tokenizer.json", "tokenizer.model"):
        shutil.copyfile(BASE / name, tmp_path / "whole" / "adapter" / name)
    for name in ("adapter_config.json", "gemma_ft.json"):
        path = tmp_path / "whole" / "adapter" / name
        path.write_text(path.read_text().replace("@BASE@", str(BASE)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_rows_that_are_encoded_anew(before: Path) -> None:
    """For what came with pictures was encoded then and is refused now; of these rows nothing else comes out."""
    (cached,) = (before / "cache").rglob("*.arrow")
    written = cached.stat().st_mtime_ns
    code, _, said = run(["train", "stopped/recipe.yaml", "--resume"], before)
    assert code == 0, said
    (anew,) = set((before / "cache").rglob("*.arrow")) - {cached}
    assert cached.stat().st_mtime_ns == written
    first, second = (Dataset.from_file(str(file)).to_list() for file in (cached, anew))
    assert first == second
    losses = {
        name: [json.loads(line)["loss"] for line in (before / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    }
    assert len(losses["whole"]) == 6
    assert losses["stopped"] == pytest.approx(losses["whole"], rel=1e-3)
    known = facts(before)
    same = (hashed(cpu_flags().encode()), torch.__version__) == (known["processor"], known["torch"])
    if same:  # another processor or torch sums in another order
        assert losses["stopped"] == losses["whole"]
        assert hashed((before / "stopped" / "adapter" / "adapter_model.safetensors").read_bytes()) == known["adapter"]


def test_its_recipe_reads_as_it_was_settled(before: Path) -> None:
    recipe = load_recipe(before / "whole" / "recipe.yaml").recipe
    assert (recipe.adapter.rank, recipe.train.max_steps, recipe.model.preset) == (1, 6, "gemma-tiny")
    assert [source.path for source in recipe.data.train] == ["rows.jsonl"]


def test_its_adapter_gives_the_logits_that_it_gave(before: Path) -> None:
    known = facts(before)
    with torch.no_grad():
        logits = load_model("whole", dtype=torch.float32)(torch.tensor([known["ids"]])).logits[0, -1]
    torch.testing.assert_close(logits[known["top"]], torch.tensor(known["logits"]), rtol=1e-4, atol=1e-4)


def test_its_adapter_becomes_the_same_gguf(before: Path) -> None:
    gguf = pytest.importorskip("gguf")
    assert main(["export", "whole", "--to", "gguf", "--out", "made"]) == 0
    reader = gguf.GGUFReader(next((before / "made").glob("*.gguf")))
    tensors = "".join(f"{one.name}{hashed(one.data.tobytes())}" for one in sorted(reader.tensors, key=lambda t: t.name))
    metadata = {
        name: hashed(b"".join(bytes(field.parts[part]) for part in field.data))
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "general.", "gemma_ft."))
    }
    assert hashed(tensors.encode()) == facts(before)["gguf_tensors"]
    assert metadata == facts(before)["gguf_metadata"]
