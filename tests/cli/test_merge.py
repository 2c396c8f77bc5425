"""`gemma-ft merge` as a user meets it: options, the table, exit codes, and where merge.json lies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base
from gemma_ft.cli.app import main
from gemma_ft.export.merge import certificate
from gemma_ft.recipe.load import load_recipe
from gemma_ft.system import environment
from gemma_ft.train.run_dir import RunDir
from tests.export.tuned import ROOT, TINY, names_in, save_tuned

TABLE = ["mean KL", "max KL", "max |dlogit|", "relative", "top-1 same", "original", "dequantized", "nf4 base"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the tiny base, quantized to nf4; amplified weights would not bear the quantizing."""
    environment.quiet_libraries()
    root = tmp_path_factory.mktemp("cli")
    model = load_base(Source(TINY, None), dtype=torch.float32)
    save_tuned(root / "run" / "adapter", Path(TINY), model, quantize="nf4", lora_alpha=0.5)
    recipe = load_recipe(ROOT / "recipes" / "sft_tiny.yaml", ["data.max_seq_len=128"]).recipe
    RunDir(root / "run").write_recipe(recipe)
    return root


def test_a_run_is_merged_certified_and_told(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["merge", str(made / "run"), "--out", str(tmp_path / "out"), "--prompts", "2", "--dtype", "bf16"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert all(word in out for word in TABLE)
    assert max(map(len, out.splitlines()[3:-1])) <= 80
    lines = out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out: 68 tensors, ")
    assert lines[0].endswith(" GB, bfloat16")
    assert lines[1] == f"  base      {TINY} (original)"
    assert lines[2] == "  merged    lora run/adapter x 1; 26 tensors are the base's own"
    facts = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert lines[-1] == (
        "  passed: mean_kl at most 0.1 (trained over quantized weights, merged into others); 2 prompts, "
        f"{facts['certificate']['positions']} positions of data/scheduling_eval.jsonl"
    )
    assert (made / "run" / "merge.json").read_text() == (tmp_path / "out" / "merge.json").read_text()
    assert names_in(made / "run") == ["adapter", "merge.json", "recipe.yaml"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(
    number: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(folder: Path, *_: object, **__: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr("gemma_ft.export.merge.merge.write_shards", killed)
    assert main(["merge", str(made / "run"), "--out", str(tmp_path / "out"), "--prompts", "0"]) == 143
    assert capsys.readouterr() == ("", "stopped by a signal\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


def test_no_certificate_when_none_is_asked_for(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(made / "run"), "--out", str(tmp_path / "out"), "--prompts", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  no certificate: --prompts 0"
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["certificate"] is None


def test_a_runs_adapter_leaves_its_facts_in_the_run(made: Path, tmp_path: Path) -> None:
    (made / "run" / "merge.json").write_text("old")
    assert main(["merge", str(made / "run" / "adapter"), "--out", str(tmp_path / "out"), "--prompts", "0"]) == 0
    assert (made / "run" / "merge.json").read_text() == (tmp_path / "out" / "merge.json").read_text()


def test_beyond_the_limit_the_figures_are_shown_and_the_exit_code_is_1(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "REQUANTIZED", certificate.Limit("relative_dlogit", 1e-6, "as a test"))
    assert main(["merge", str(made / "run"), "--out", str(tmp_path / "out"), "--prompts", "1"]) == 1
    out, err = capsys.readouterr()
    assert all(word in out for word in TABLE)
    assert out.splitlines()[-1].startswith("  FAILED: relative_dlogit at most 1e-06 (as a test); 1 prompts, ")
    assert err.startswith("the merged model is too far from the trained one: relative_dlogit ")
    assert len(err.splitlines()) == 1
    assert names_in(tmp_path) == []


def test_adapters_with_weights_replace_the_runs_own(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = made / "run" / "adapter"
    before = (made / "run" / "merge.json").exists()
    chosen = ["--adapter", f"{made / 'run'}:0.25", "--adapter", f"{adapter}:-1.5"]
    assert main(["merge", TINY, "--out", str(tmp_path / "out"), "--prompts", "1", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == ("  merged    lora run/adapter x 0.25, lora run/adapter x -1.5; 26 tensors are the base's own")
    assert (made / "run" / "merge.json").exists() == before


@pytest.mark.parametrize("number", ["x", "nan", "inf", "0", ""])
def test_a_weight_that_is_none_is_refused(number: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{made / 'run'}:{number}"
    assert main(["merge", TINY, "--out", "out", "--adapter", text]) == 2
    assert capsys.readouterr().err == (
        f"--adapter {text}: expected DIR or DIR:WEIGHT with a number other than 0, got {number!r}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "gemma-ft merge: Missing option '--out'; gemma-ft merge --help shows what it takes"),
        (["--out", "o", "--dtype", "f16"],
         "gemma-ft merge: Invalid value for '--dtype': Value error, 'f16' is not one of 'bf16', 'f32'; gemma-ft merge "
         "--help shows what it takes"),
        (["--out", "RUN"], "RUN: exists already; choose another --out, or move it away"),
    ],
)  # fmt: skip
def test_misuse_is_one_line(arguments: list[str], line: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(made / "run")
    assert main(["merge", run, *(run if word == "RUN" else word for word in arguments)]) == 2
    assert capsys.readouterr().err == line.replace("RUN", run) + "\n"


def test_a_fully_tuned_run_has_nothing_to_merge(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(TINY)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"{TINY}: is a whole model, with nothing to merge; gemma-ft export MODEL --to hf --out DIR copies it, "
        "--adapter DIR names an adapter for it\n"
    )
