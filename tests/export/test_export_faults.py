"""What an export refuses, in one line each, and that one which fails leaves nothing."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.errors import DiskError, UserError
from gemma_ft.export import formats, hf_form
from tests.export.test_export import export, refusal
from tests.export.tuned import names_in


def test_options_that_do_not_go_together(made: Path, tmp_path: Path) -> None:
    run, out = made / "run", tmp_path / "out"
    assert refusal(run, out, "hf", gguf_type="f16") == "--gguf-type: goes with --to gguf, not with --to hf"
    assert refusal(run, out, "adapter", dtype="f32") == "--dtype: goes with --to hf, not with --to adapter"
    assert refusal(run, out, "gguf", dtype="f32") == (
        "--dtype: goes with --to hf, not with --to gguf; --gguf-type says how a GGUF file stores its weights"
    )
    assert refusal(run, out, "hf", base_id="a/b") == "--base-id: goes with --to adapter, not with --to hf"
    assert refusal(run, out, "adapter", base_id="a") == "--base-id a: expected OWNER/NAME, as on the hub"
    assert refusal(run, out, "hf", public=True) == "--public: goes with --push OWNER/NAME"
    assert refusal(run, tmp_path / "x.gguf", "gguf", push="a/b") == (
        "--push: x.gguf would go without model card and notice; name a folder: --out x"
    )
    assert refusal(run, out, "adapter") == f"{run}/model: is a whole model without an adapter; use --to hf"
    assert refusal(made / "adapter", out, "adapter", push="a/b") == (
        f"--push: the adapter's base is the local folder {made}/base, which nobody else has; name the same weights on "
        "the hub with --base-id OWNER/NAME, or use --to hf"
    )
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("to", "name"), [("hf", "adapter"), ("hf", "run"), ("adapter", "adapter"), ("gguf", "adapter"), ("gguf", "run")]
)
def test_what_is_there_already_is_not_touched(to: str, name: str, made: Path, tmp_path: Path) -> None:
    source = made / name
    (tmp_path / "out").mkdir()
    assert refusal(source, tmp_path / "out", to) == (
        f"{tmp_path}/out: exists already; choose another --out, or move it away"
    )
    (tmp_path / "x.gguf").write_text("mine")
    assert refusal(source, tmp_path / "x.gguf", to).startswith(f"{tmp_path}/x.gguf: exists already; ")
    assert (tmp_path / "x.gguf").read_text() == "mine"
    assert names_in(tmp_path) == ["out", "x.gguf"]


def test_a_full_disk_is_seen_before_anything_is_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    for to, name in (("hf", "adapter"), ("hf", "run"), ("adapter", "adapter"), ("gguf", "run")):
        with pytest.raises(DiskError, match=r"out: needs \S+ GB, its disk has \S+ GB left; free some, or choose"):
            export(made / name, tmp_path / "out", to)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("to", "out"), [("hf", "out"), ("gguf", "out"), ("gguf", "x.gguf"), ("adapter", "out")])
def test_a_disk_that_fills_up_leaves_nothing(to: str, out: str, made: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DiskError) as error:
            export(made / "adapter", tmp_path / out, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{tmp_path}/{out}: no space left to write it; free some and run again"
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("to", "out", "fault"),
    [("hf", "out", "write_shards"), ("hf", "out", "verify"), ("gguf", "x.gguf", "write_gguf"),
     ("gguf", "out", "modelfile"), ("adapter", "out", "write_adapter")],
)  # fmt: skip
def test_a_fault_on_the_way_leaves_nothing(
    to: str, out: str, fault: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step does its work and then fails, so that something was written."""
    module = hf_form if to == "hf" else formats
    step, source = getattr(module, fault), made / ("adapter" if to == "adapter" else "run")

    def fails(*arguments: Any, **options: Any) -> Any:
        step(*arguments, **options)
        raise UserError("a fault on the way")

    monkeypatch.setattr(module, fault, fails)
    assert refusal(source, tmp_path / out, to) == "a fault on the way"
    assert names_in(tmp_path) == []


def damaged(folder: Path, out: Path, name: str, data: bytes | None) -> Path:
    """A copy of a folder in which a file has other bytes, or is gone."""
    shutil.copytree(folder, out)
    (out / name).unlink() if data is None else (out / name).write_bytes(data)
    return out


def test_damaged_sources_are_one_line_each(made: Path, tmp_path: Path) -> None:
    model, sources = made / "run" / "model", tmp_path / "sources"
    cut = (model / "model.safetensors").read_bytes()[:-100]
    found = refusal(damaged(model, sources / "cut", "model.safetensors", cut), tmp_path / "out", "gguf")
    assert found.startswith(f"{sources}/cut/model.safetensors: damaged or cut short (")
    found = refusal(damaged(model, sources / "no", "model.safetensors", None), tmp_path / "out", "hf")
    assert found == f"{sources}/no: there is no model.safetensors in it, nor an index of shards"
    found = refusal(damaged(model, sources / "bad", "config.json", b"{"), tmp_path / "out", "gguf")
    assert found.startswith(f"{sources}/bad/config.json: cannot be read as a Gemma's: ")
    found = refusal(damaged(model, sources / "other", "chat_template.jinja", b"x"), tmp_path / "out", "hf")
    assert found.endswith("its chat template is not the one that was trained (gemma_ft.json); restore the tokenizer "
                          "files that were saved with it")  # fmt: skip
    assert refusal(damaged(model, sources / "t", "chat_template.jinja", b"x"), tmp_path / "out", "gguf") == (
        found.replace("other", "t")
    )
    assert names_in(tmp_path) == ["sources"]


def test_an_adapter_of_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    contract = json.loads((tmp_path / "adapter" / "gemma_ft.json").read_text())
    (tmp_path / "adapter" / "gemma_ft.json").write_text(json.dumps({**contract, "base_sha256": "0" * 64}))
    for to in ("hf", "adapter", "gguf"):
        found = refusal(tmp_path / "adapter", tmp_path / "out", to)
        assert found.startswith(f"{tmp_path}/adapter: was trained on {made}/base with fingerprint 000000000000, but ")
    assert names_in(tmp_path) == ["adapter"]
