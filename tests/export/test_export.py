"""An export in each form: what stock libraries make of it, what travels with it; a failed one leaves nothing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_ft.build.contract import Contract
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_model
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export import hf_form
from gemma_ft.export.export import ExportOptions
from gemma_ft.ui.export import export_and_show
from tests.export.tuned import TINY, names_in, same_bytes, save_base, tensors

BESIDE = ["README.md", "chat_template.jinja", "config.json", "gemma_ft.json", "generation_config.json",
          "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip
# What vLLM reads of a Gemma's config.json. Source: vllm/model_executor/models/gemma.py, gemma2.py.
VLLM_KEYS = {"architectures", "attention_bias", "head_dim", "hidden_size", "intermediate_size",
             "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
             "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size"}  # fmt: skip
VLLM_KEYS_2 = {"attn_logit_softcapping", "final_logit_softcapping", "hidden_activation", "layer_types",
               "query_pre_attn_scalar", "sliding_window"}  # fmt: skip


def export(source: Path | str, out: Path, to: Any, *, dry_run: bool = False, api: Any = None, **wish: Any) -> list[str]:
    """Export and return the lines that were said."""
    console = Console(file=io.StringIO(), width=120)
    export_and_show(str(source), ExportOptions(to=to, out=out, **wish), dry_run=dry_run, console=console, api=api)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(("name", "named"), [("</s>", True), ("[EOS]", True), ("</h2>", False)])
def test_a_gguf_export_names_text_that_llama_cpp_ends_an_answer_at(
    name: str, named: bool, dry_run: bool, made: Path, tmp_path: Path
) -> None:
    """llama.cpp src/llama-vocab.cpp finds end tokens by their text: "</s>" is one, and text in every Gemma."""
    folder = shutil.copytree(made / "base", tmp_path / "base")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"][name] = spec["model"]["vocab"].pop("</h2>")
    next(token for token in spec["added_tokens"] if token["content"] == "</h2>")["content"] = name
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "text_tokens": [name]}))
    said = export(folder, tmp_path / "x.gguf", "gguf", dry_run=dry_run)
    line = (
        f"note: llama.cpp takes {name} for the end of an answer, whatever the file says; it was text in training, and "
        "an answer that holds it stops there"
    )
    assert [one for one in said if "llama.cpp" in one] == ([line] if named else [])


def refusal(*arguments: Any, **wish: Any) -> str:
    with pytest.raises(UserError) as error:
        export(*arguments, **wish)
    return str(error.value)


@pytest.mark.parametrize("to", ["full", "merged"])
def test_stock_transformers_loads_a_folder_strictly_and_agrees(to: str, made: Path, tmp_path: Path) -> None:
    source, system = (made / "run", True) if to == "full" else (made / "adapter", False)
    export(source, tmp_path / "out", "hf")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    ids = torch.randint(4, 2000, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(ids).logits, load_model(source, dtype=torch.float32)(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    contract = Contract.read(tmp_path / "out")
    assert contract is not None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoder = contract.encoder(load_tokenizer(str(tmp_path / "out")), "out")
    assert (encoder.system_policy, tokenizer("Hi").input_ids[:1]) == ("fold" if system else "drop", [2])
    turns = [Turn("system", "Be kind."), Turn("user", " Hi \n there"), Turn("assistant", "Yo."), Turn("user", "So?")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert rendered == encoder.encode_prompt(turns)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 6]
    assert model.generation_config.eos_token_id == [1, 6]


def test_a_full_run_is_copied_byte_for_byte_and_cast_when_asked(made: Path, tmp_path: Path) -> None:
    said = export(made / "run", tmp_path / "out", "hf")
    assert names_in(tmp_path / "out") == sorted([*BESIDE, "NOTICE", "model.safetensors"])
    before, found = tensors(made / "run" / "model"), tensors(tmp_path / "out")
    assert found.keys() == before.keys()
    assert all(same_bytes(found[name], before[name]) for name in before)
    assert said[0].startswith(f"{tmp_path}/out: 10 files, ")
    assert sorted(line.split()[-1] for line in said[1:]) == names_in(tmp_path / "out")
    export(made / "run", tmp_path / "narrow", "hf", dtype="bf16")
    assert all(same_bytes(weight, before[name].bfloat16()) for name, weight in tensors(tmp_path / "narrow").items())
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_sharded(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_shards(*arguments: Any) -> Any:
        return write(*arguments, max_shard_bytes=1_000_000)

    write = hf_form.write_shards
    monkeypatch.setattr(hf_form, "write_shards", small_shards)
    export(made / "run", tmp_path / "out", "hf")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(("shape", "keys"), [("gemma-2b", VLLM_KEYS), ("gemma-2-9b", VLLM_KEYS | VLLM_KEYS_2)])
def test_the_config_holds_what_vllm_reads(shape: str, keys: set[str], tmp_path: Path) -> None:
    export(save_base(tmp_path / "base", shape), tmp_path / "out", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys - config.keys() == set()
    assert config["architectures"] == ["GemmaForCausalLM" if shape == "gemma-2b" else "Gemma2ForCausalLM"]
    assert config.get("hidden_activation", "gelu_pytorch_tanh") == "gelu_pytorch_tanh"
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_no_paper_holds_a_path_of_this_machine(made: Path, tmp_path: Path) -> None:
    for source in ("run", "adapter"):
        export(made / source, tmp_path / source, "hf")
        export(made / source, tmp_path / f"{source}-gguf", "gguf")
    texts = [path for path in tmp_path.rglob("*") if path.suffix in (".md", ".json", "") and path.is_file()]
    assert len(texts) == 23
    for path in texts:
        text = path.read_text()
        assert not any(place in text for place in ("/home/", str(made), str(tmp_path))), path
    assert Contract.read(tmp_path / "run").base == "base"  # type: ignore[union-attr]


def test_a_gguf_file_and_a_gguf_folder(made: Path, tmp_path: Path) -> None:
    export(made / "adapter", tmp_path / "new" / "tuned.gguf", "gguf", gguf_type="q8_0")
    assert names_in(tmp_path / "new") == ["Modelfile", "tuned.gguf"]
    assert "FROM ./tuned.gguf\n" in (tmp_path / "new" / "Modelfile").read_text()
    export(made / "adapter", tmp_path / "new" / "other.gguf", "gguf")
    assert names_in(tmp_path / "new") == ["Modelfile", "other.Modelfile", "other.gguf", "tuned.gguf"]
    assert "FROM ./other.gguf\n" in (tmp_path / "new" / "other.Modelfile").read_text()
    export(made / "adapter", tmp_path / "folder", "gguf")
    assert names_in(tmp_path / "folder") == ["Modelfile", "NOTICE", "README.md", "folder-f32.gguf", "gemma_ft.json"]
    assert "FROM ./folder-f32.gguf\n" in (tmp_path / "folder" / "Modelfile").read_text()


def test_a_gguf_of_an_adapter_is_that_of_the_merged_folder(made: Path, tmp_path: Path) -> None:
    export(made / "adapter", tmp_path / "one.gguf", "gguf", gguf_type="bf16")
    export(made / "adapter", tmp_path / "merged", "hf", dtype="f32")
    export(tmp_path / "merged", tmp_path / "x" / "one.gguf", "gguf", gguf_type="bf16")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "x" / "one.gguf").read_bytes()


@pytest.mark.parametrize("to", ["hf", "adapter", "gguf"])
def test_a_dry_run_names_the_files_and_writes_nothing(to: str, made: Path, tmp_path: Path) -> None:
    wish = {"push": "me/it", "base_id": "google/gemma-2-9b"} if to == "adapter" else {"push": "me/it"}
    said = export(made / "adapter", tmp_path / "out", to, dry_run=True, **wish)
    assert names_in(tmp_path) == []
    export(made / "adapter", tmp_path / "out", to, **{key: wish[key] for key in wish if key != "push"})
    promised = {line.split()[-1] for line in said if line.startswith("     ")}
    assert promised == set(names_in(tmp_path / "out"))
    assert said[0] == f"export {made}/adapter to {tmp_path}/out, dry run: nothing is written or sent"
    assert [line for line in said if f"{len(promised)} files, " in line and line.endswith(" to me/it (private)")]


def test_a_folder_without_a_contract_keeps_its_own_template(tmp_path: Path) -> None:
    export(TINY, tmp_path / "out", "hf")
    assert "gemma_ft.json" not in names_in(tmp_path / "out")
    assert place_of(tmp_path / "out").contract is None
    export(TINY, tmp_path / "x.gguf", "gguf")
    assert names_in(tmp_path) == ["Modelfile", "out", "x.gguf"]


def test_a_folder_beside_a_gguf_file_is_nobody_elses(made: Path, tmp_path: Path) -> None:
    (tmp_path / ".z.gguf.export").mkdir()
    (tmp_path / ".z.gguf.export" / "mine").write_text("mine")
    export(made / "run", tmp_path / "z.gguf", "gguf")
    assert names_in(tmp_path) == [".z.gguf.export", "Modelfile", "z.gguf"]
    assert names_in(tmp_path / ".z.gguf.export") == ["mine"]


def test_float16_weights_are_stored_in_a_gguf_file_as_they_are(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    base = save_base(tmp_path / "half", "gemma-2-9b", dtype=torch.float16)
    export(base, tmp_path / "out", "gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tmp_path / "out" / "out-f16.gguf")).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, 2)
    weights = load_file(base / "model.safetensors")
    assert len(stored) == len(weights)
    for name, weight in weights.items():
        found = stored[names.get_name(name, try_suffixes=(".weight",))]
        data = torch.from_numpy(found.data.copy()).reshape(weight.shape)
        if "norm" in name:  # of which llama.cpp wants one more, in float32
            assert torch.equal(data, weight.float() + 1), name
        else:
            assert data.dtype == torch.float16, name
            assert torch.equal(data.view(torch.int16), weight.view(torch.int16)), name


def test_a_certificate_travels_into_a_gguf_folder(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run" / "model", tmp_path / "merged")
    (tmp_path / "merged" / "merge.json").write_text('{"base": {"name": "/home/my me/base"}, "certificate": null}')
    export(tmp_path / "merged", tmp_path / "out", "gguf")
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["base"] == {"name": "base"}


@pytest.mark.parametrize(
    ("to", "wish", "cast_to"),
    [
        ("hf", {}, None),
        ("hf", {"dtype": "bf16"}, "bfloat16"),
        ("gguf", {}, None),
        ("gguf", {"gguf_type": "q8_0"}, "q8_0"),
    ],
)
def test_a_certificate_is_of_the_weights_beside_it(
    made: Path, tmp_path: Path, to: Any, wish: dict[str, Any], cast_to: str | None
) -> None:
    """Weights that were cast since have none; the card says of which folder the figures are."""
    shutil.copytree(made / "run" / "model", tmp_path / "merged")
    facts = {"policy": "original", "certificate": {"merged": {"mean_kl": 0.25}, "passed": True}}
    (tmp_path / "merged" / "merge.json").write_text(json.dumps(facts))
    export(tmp_path / "merged", tmp_path / "out", to, **wish)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| mean kl | 0.25 |" in card
    assert (tmp_path / "out" / "merge.json").exists() == (cast_to is None)
    assert ("as `merge.json` says in full" in card) == (cast_to is None)
    assert (f"they were cast to {cast_to} since" in card) == (cast_to is not None)
