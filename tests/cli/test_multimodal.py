"""A multimodal folder goes in, is tuned by the command line, and comes out under its own tower, as a user does it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

from gemma_ft.build.weights import WeightFiles
from gemma_ft.cli.app import main
from gemma_ft.export.gguf_reader import read_gguf
from gemma_ft.families.records import PRESETS
from gemma_ft.infer.session import open_session
from gemma_ft.model.config import read_config
from gemma_ft.serve.limits import Limits
from tests.export.tuned import names_in, same_bytes
from tests.multimodal import reference, save_multimodal
from tests.parity.amplified import relative
from tests.serve.conftest import serving

IDS = torch.randint(8, 300, (1, 40), generator=torch.Generator().manual_seed(0))
SIZE = "gemma-3-4b"
QUESTION, TOKENS = "photo shoot, 17:05, 35 minutes, Wednesday, with Yusuf", 4


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bf16 in two shards; its size is what the preset says."""
    folder = save_multimodal(tmp_path / "base", dtype=torch.bfloat16, shard="600KB")
    config = read_config(folder).to_dict()
    tiny = {key: config[key] for key in PRESETS[SIZE].fields}
    monkeypatch.setitem(PRESETS, SIZE, replace(PRESETS[SIZE], fields=tiny))
    return folder


def train(base: Path, run: Path, *words: str) -> int:
    settings = [
        f"model.preset={SIZE}", f"model.weights={base}", f"output_dir={run}", "data.train=data/scheduling_eval.jsonl",
        "eval.overlap=allow", "data.max_seq_len=100", "data.packing=false", "eval.max_rows=2", "eval.generate_rows=0",
        "eval.samples=0", "checkpoint.every_steps=1",
    ]  # fmt: skip
    return main(["train", "sft_tiny", *settings, *words])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles.open(folder)
    return {name: files.tensor(name) for name in files.names}


def test_a_multimodal_folder_is_tuned_and_comes_out_whole(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, lora = tmp_path / "run", ["strategy=lora", "~quantize", "adapter.rank=2"]
    assert train(base, run, *lora, "train.max_steps=1") == 0
    assert "multi_modal_projector, vision_tower: 67.0 kB stay in the folder, not loaded" in capsys.readouterr().out
    assert train(base, run, *lora, "train.max_steps=3", "--resume") == 0
    for words in (
        ["merge", str(run), "--out", f"{tmp_path}/text", "--prompts", "2"],
        ["merge", str(run), "--out", f"{tmp_path}/graft", "--prompts", "2", "--graft"],
        ["export", str(run), "--to", "hf", "--out", f"{tmp_path}/exported", "--graft"],
        ["export", str(run), "--to", "adapter", "--out", f"{tmp_path}/adapter"],
    ):
        capsys.readouterr()
        assert main(words) == 0, words
        if words[0] == "merge" and "--graft" in words:
            line = f"  graft     among the files of {base}: 94 of 143 tensors are its own"
            assert line in capsys.readouterr().out.splitlines()

    before, after = tensors(base), tensors(tmp_path / "graft")
    tuned = {name for name in before if not same_bytes(before[name], after[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in tuned} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(name.startswith("language_model.model.layers.") for name in tuned)
    assert len(tuned) == 49
    for name in set(names_in(base)) - set(WeightFiles.open(base).shards):
        assert (tmp_path / "graft" / name).read_bytes() == (base / name).read_bytes(), name
    for file in WeightFiles.open(base).shards:
        assert (tmp_path / "graft" / file).read_bytes() == (tmp_path / "exported" / file).read_bytes()

    whole, image = reference(tmp_path / "graft"), reference(base)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "graft"), Gemma3ForConditionalGeneration)
    logits = whole(input_ids=IDS).logits
    assert relative(logits, text(IDS).logits) < 1e-5
    assert relative(logits, image(input_ids=IDS).logits) > 1e-3, "it was tuned"
    for adapter in (run / "adapter", tmp_path / "adapter"):
        wrapped = PeftModel.from_pretrained(reference(base), adapter).eval()
        assert relative(wrapped(input_ids=IDS).logits, logits) < 0.05, "bf16 rounds the merged weights"
    assert main(["generate", f"{tmp_path}/graft", "--prompt", "Hello", "--max-tokens", "2"]) == 0
    told = "multi_modal_projector, vision_tower: 67.0 kB stay in the folder, not loaded"
    assert f"{tmp_path}/graft: {told}" in open_session(tmp_path / "graft").notes


def test_a_graft_is_a_base_again_and_a_full_run_of_it_goes_back(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ["strategy=full", "~quantize", "~adapter", "train.precision=bf16", "train.max_steps=1"]
    assert train(base, tmp_path / "full", *full) == 0
    words = ["export", f"{tmp_path}/full", "--to", "hf", "--out", f"{tmp_path}/graft", "--graft"]
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    steps = capsys.readouterr().out.splitlines()
    assert steps[1] == "1. copy the weights of model, in the files of base"
    assert [line.split()[-1] for line in steps[2:4]] == sorted(WeightFiles.open(base).shards)
    assert not (tmp_path / "graft").exists()
    assert main(words) == 0
    before, after = tensors(base), tensors(tmp_path / "graft")
    assert {name for name in before if not same_bytes(before[name], after[name])} <= {
        name for name in before if name.startswith("language_model.")
    }
    own = tensors(tmp_path / "full" / "model")
    assert all(same_bytes(after[f"language_model.{name}"], one) for name, one in own.items())
    assert train(tmp_path / "graft", tmp_path / "again", "adapter.rank=2", "train.max_steps=1") == 0


def asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a verb that answers writes to stdout."""
    capsys.readouterr()
    assert main([*words, "--max-tokens", str(TOKENS)]) == 0, words
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_every_verb_gives_a_run_s_answer(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate, chat and the server, at once and streamed, in the numbers and over the weights of training."""
    strategy = ["strategy=lora", "~quantize"] if kind == "none" else ["strategy=qlora", f"quantize.kind={kind}"]
    run = tmp_path / "run"
    assert train(base, run, *strategy, "adapter.rank=2", "train.max_steps=6") == 0
    answer = asked(["generate", str(run), "--prompt", QUESTION], capsys)
    assert answer
    assert answer != asked(["generate", str(base), "--prompt", QUESTION], capsys), "it was tuned"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert asked(["chat", str(run)], capsys) == answer
    chat = {"model": "run", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": TOKENS}
    with serving(open_session(run, max_batch=2), Limits(max_batch=2)) as served:
        whole = json.loads(served.ask("POST", "/v1/chat/completions", chat).content)["choices"][0]
        lines = served.ask("POST", "/v1/chat/completions", {**chat, "stream": True}).content.decode().split("\n\n")
    assert (whole["message"]["content"].strip(), whole["finish_reason"]) == (answer, "length")
    parts = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(part["delta"].get("content", "") for part in parts) == whole["message"]["content"]
    assert main(["eval", str(run), "--rows", "2", "--out", f"{tmp_path}/eval.json"]) == 0
    assert list(json.loads((tmp_path / "eval.json").read_text())["models"]) == ["base", "adapter", "merged"]
    assert main(["report", str(run), "--out", f"{tmp_path}/report.html"]) == 0
    assert SIZE in (tmp_path / "report.html").read_text()


def test_its_text_goes_into_a_gguf_file_and_back(base: Path, tmp_path: Path) -> None:
    """Tuned and merged, in float32: what comes back is bit for bit what was merged, by the config of either folder."""
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    run, merged, file = tmp_path / "run", tmp_path / "merged", tmp_path / "x.gguf"
    assert train(base, run, "strategy=lora", "~quantize", "adapter.rank=2", "train.max_steps=1") == 0
    assert main(["merge", str(run), "--out", str(merged), "--prompts", "2"]) == 0
    for source, out in ((merged, file), (run, tmp_path / "y.gguf")):
        assert main(["export", str(source), "--to", "gguf", "--gguf-type", "f32", "--out", str(out)]) == 0
    expected = tensors(merged)
    assert not any("vision" in name or "projector" in name for name in expected)
    for name, config in (("by_base", base), ("by_merged", merged)):
        words = ["import", str(file), "--config", str(config / "config.json"), "--out", str(tmp_path / name)]
        assert main(words) == 0
        found = tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(same_bytes(one, expected[key].float()) for key, one in found.items())
        assert read_config(tmp_path / name).layer_types == read_config(base).layer_types
    again = tmp_path / "z.gguf"
    assert main(["export", f"{tmp_path}/by_base", "--to", "gguf", "--gguf-type", "f32", "--out", str(again)]) == 0
    first, second = (read_gguf(each) for each in (file, again))
    assert len(first.tensors) == len(expected)
    for name, one in first.tensors.items():
        other = second.tensors[name]
        assert one.type == other.type == "F32"
        assert bytes(first.data[one.start :][: one.bytes]) == bytes(second.data[other.start :][: other.bytes]), name


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["export", "--to", "gguf"], "--graft: goes with --to hf, not with --to gguf"),
        (["export", "--to", "adapter"], "--graft: goes with --to hf, not with --to adapter"),
        (["export", "--to", "hf"],
         "--graft: BASE does not say what it was tuned from (gemma_ft.json); name a run"),
        (["merge"], "BASE: is a whole model, with nothing to merge; gemma-ft export MODEL --to hf --out DIR copies it, "
         "--adapter DIR names an adapter for it"),
    ],
)  # fmt: skip
def test_misuse_is_one_line_and_exit_code_2(
    words: list[str], line: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *more = words
    assert main([verb, str(base), "--out", f"{tmp_path}/out", "--graft", *more]) == 2
    assert capsys.readouterr().err.replace(str(base), "BASE") == line + "\n"
    assert not (tmp_path / "out").exists()


def test_faults_p10_and_p11_text_pairs_need_no_processor(base: Path, tmp_path: Path) -> None:
    """Where a folder has a processor, its tokenizer is taken all the same, and rows of text bring no marks of images
    (reports: TRL issues 3982 and 4022, unsloth issue 7202).
    """
    (base / "processor_config.json").write_text('{"processor_class": "Gemma3Processor", "image_seq_length": 4}\n')
    run = tmp_path / "run"
    words = ["objective.kind=dpo", "data.train=data/preferences_eval.jsonl", "data.eval=null", "strategy=lora",
             "~quantize", "adapter.rank=2", "train.max_steps=1", "~data.columns"]  # fmt: skip
    assert train(base, run, *words) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_loss"] == pytest.approx(math.log(2), rel=1e-12)
