"""An exported adapter: the same weights for stock PEFT, a base that others can find, and what vLLM makes of it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from rich.console import Console
from safetensors.torch import load_file, save_file

from gemma_ft.build.contract import Contract
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base, load_model
from gemma_ft.build.weights import WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.export.adapter_folder import vllm_notes
from gemma_ft.export.export import ExportOptions
from gemma_ft.ui.export import export_and_show
from tests.export.tuned import names_in, save_base, save_tuned, wrap
from tests.parity.amplified import ours

FILES = ["NOTICE", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
         "gemma_ft.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    base = save_base(root / "base", "gemma-2-9b")
    return save_tuned(root / "adapter", base, load_base(Source(str(base), None), dtype=torch.float32), r=8)


def export(source: Path, out: Path, **wish: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    export_and_show(str(source), ExportOptions(to="adapter", out=out, **wish), console=console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_stock_peft_loads_it_and_agrees(adapter: Path, tmp_path: Path) -> None:
    said = export(adapter, tmp_path / "out")
    assert names_in(tmp_path / "out") == FILES
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.randint(4, 2000, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = stock(ids).logits, load_model(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert said[-1] == (
        f"note: the base is the local folder {adapter.parent}/base, which nobody else can resolve; "
        "--base-id OWNER/NAME names the same weights on the hub"
    )


def test_the_base_is_named_as_on_the_hub(adapter: Path, tmp_path: Path) -> None:
    source = shutil.copytree(adapter, tmp_path / "source")
    written = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**written, "revision": "of another base"}))
    said = export(source, tmp_path / "out", base_id="google/gemma-2-9b")
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.revision) == ("google/gemma-2-9b", None)
    before, after = Contract.read(adapter), Contract.read(tmp_path / "out")
    assert after is not None
    assert before is not None
    assert (after.base, after.base_sha256) == ("google/gemma-2-9b", before.base_sha256)
    assert not any(line.startswith("note: the base") for line in said)
    for path in (tmp_path / "out").iterdir():
        assert str(adapter.parent).encode() not in path.read_bytes(), path.name


def test_an_adapter_that_diverged_is_refused(adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in adapter.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name].view(-1)[0] = float("inf")
    save_file(weights, source / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        export(source, tmp_path / "out")
    assert str(error.value) == f"{source}: {name} holds NaN or infinity; the training diverged, use a checkpoint"
    assert names_in(tmp_path) == ["source"]


HF = "export --to hf for it"


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({"r": 16}, []),
        ({"r": 16, "use_rslora": True}, []),
        ({"r": 17}, ["vLLM takes ranks up to 16 unless told: serve with --max-lora-rank 32"]),
        ({"r": 600}, [f"vLLM takes ranks up to 512, this adapter has 600; {HF}"]),
        ({"use_dora": True}, [f"vLLM refuses DoRA adapters; {HF}"]),
        ({"modules_to_save": ["norm"]}, [f"vLLM refuses adapters with modules_to_save; {HF}"]),
        ({"bias": "lora_only"}, [f"vLLM refuses adapters with a bias; {HF}"]),
        ({"rank_pattern": {"q_proj": 24}},
         [f"vLLM scales all modules alike, whatever rank_pattern and alpha_pattern say; {HF}",
          "vLLM takes ranks up to 16 unless told: serve with --max-lora-rank 32"]),
        ({"target_modules": ["q_proj", "embed_tokens"]}, [f"vLLM takes no adapter on embed_tokens of a Gemma; {HF}"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_vllm_would_refuse_is_told(settings: dict[str, Any], notes: list[str], tmp_path: Path) -> None:
    """Of adapters as PEFT writes them."""
    wrap(ours("gemma-2-9b"), **settings).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert vllm_notes(config, WeightFiles.open(tmp_path, "adapter_model").names) == notes
