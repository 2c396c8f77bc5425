"""Compares llama.cpp on exported GGUF files with our own model and writes benchmarks/results/llama_cpp.json.

    pip install 'gemma-ft[gguf]' llama-cpp-python
    python -m benchmarks.llama_cpp [--run RUN]     # RUN: a finished run of the tiny Gemma; else one is trained

Two models, each in every GGUF type: the tuned tiny Gemma 2, and a tiny Gemma 1 with loud random weights. Compared are
the ids of texts, the logits of every position of prompts shorter and longer than the sliding window, greedy answers.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.record import ROOT, write_result

TYPES = ("f32", "f16", "bf16", "q8_0")
TEXTS = (
    "Hello world", "1234 5.6", "  two  spaces\n\n\nnew  lines" + "\n" * 10, "emoji 🙂 ünï 漢字",
    " lead", "tab\tx", "a\r\nb", "<b>x</b> <table>", "<unused1><0x41>", "",
    "<start_of_turn>user\nhi<end_of_turn>\n<bos><eos>",
)  # fmt: skip
QUESTIONS = (
    "photo shoot, 17:05, 35 minutes, Wednesday, with Yusuf",
    "I will see Maya on Sunday at half past ten in the morning for a parent meeting of 45 minutes.",
    "Hey! Set up a design review on Sunday with Dr. Lopez at 17:45 for 25 minutes. Thanks a lot.",
    "Please book a dentist appointment on Tuesday at half past two in the afternoon with Ana for forty-five minutes.",
    "Write in digits: half past two in the afternoon",
)
LENGTHS = (20, 60, 300)  # tokens; the tiny Gemma 2 has a window of 64
ANSWER_TOKENS = 48


def open_gguf(path: Path, tokens: int) -> Any:
    """llama.cpp on a file: float32 cache, logits of every position, one thread."""
    from llama_cpp import GGML_TYPE_F32, Llama

    return Llama(str(path), n_ctx=tokens, n_batch=tokens, n_threads=1, logits_all=True, flash_attn=False,
                 type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False)  # fmt: skip


def amx_fault(kind: str) -> str | None:
    """Why this build of llama.cpp cannot be asked about a type here, or None."""
    from llama_cpp import llama_print_system_info

    if kind == "q8_0" and b"AMX_INT8 = 1" in llama_print_system_info():
        return "llama.cpp's int8 kernel for AMX crashes on models this small (seen with llama-cpp-python 0.3.36)"
    return None


def llama_logits(llama: Any, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of every position of one prompt."""
    llama.reset()
    llama.eval(list(ids))
    return np.array(llama.scores[: len(ids)])


def llama_greedy(llama: Any, ids: Sequence[int], stop_ids: Sequence[int], tokens: int) -> list[int]:
    """The likeliest continuation, without what ended it."""
    llama.reset()
    llama.eval(list(ids))
    answer: list[int] = []
    while len(answer) < tokens:
        token = int(np.argmax(llama.scores[llama.n_tokens - 1]))
        if token in stop_ids:
            break
        answer.append(token)
        llama.eval([token])
    return answer


@torch.no_grad()
def our_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """The same of our model."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def our_greedy(model: Any, ids: Sequence[int], stop_ids: Sequence[int], tokens: int) -> list[int]:
    """The same of our model, every step from the start."""
    answer: list[int] = []
    while len(answer) < tokens:
        token = int(our_logits(model, [*ids, *answer])[-1].argmax())
        if token in stop_ids:
            break
        answer.append(token)
    return answer


def put_stored_weights(model: Any, path: Path) -> None:
    """Give our model the weights of a GGUF file, back in float32: what is left of a difference is arithmetic."""
    import gguf

    config = model.config
    arch = {"gemma": gguf.MODEL_ARCH.GEMMA, "gemma2": gguf.MODEL_ARCH.GEMMA2}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            weight.copy_(values.reshape(weight.shape) - (1.0 if name.endswith("norm.weight") else 0.0))


def compare(folder: Path, path: Path, questions: Sequence[str]) -> dict[str, Any]:
    """What llama.cpp does with the GGUF file of a model folder, beside what our model does in float32.

    `stored`: our model with the file's own weights, so that only arithmetic differs. `original`: with the folder's, so
    that the rounding of the file is in it too. Both: largest |difference| of logits over the largest |logit|.
    """
    from gemma_ft.build.pretrained import load_model, load_tokenizer
    from gemma_ft.data.conversation import Turn
    from gemma_ft.data.encode.chat import ChatEncoder

    tokenizer = load_tokenizer(folder)
    encoder = ChatEncoder(tokenizer)
    model = load_model(folder, dtype=torch.float32)
    llama = open_gguf(path, max(LENGTHS) + ANSWER_TOKENS)
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(4, len(tokenizer), (length - 1,), generator=generator).tolist() for length in LENGTHS]
    prompts = [[encoder.control.bos, *ids] for ids in draw]
    asked = [encoder.encode_prompt([Turn("user", question)]) for question in questions]
    found = [llama_logits(llama, ids) for ids in prompts]
    answers = [llama_greedy(llama, ids, encoder.stop_ids, ANSWER_TOKENS) for ids in asked]
    expected = [our_greedy(model, ids, encoder.stop_ids, ANSWER_TOKENS) for ids in asked]
    original = [our_logits(model, ids) for ids in prompts]
    put_stored_weights(model, path)
    stored = [our_logits(model, ids) for ids in prompts]
    same_ids = [
        llama.tokenize(text.encode(), add_bos=False, special=False) == encoder.content.encode(text)
        and llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids
        for text in TEXTS
    ]
    result = {
        "bytes": path.stat().st_size,
        "stored": max(_relative(one, other) for one, other in zip(found, stored, strict=True)),
        "original": max(_relative(one, other) for one, other in zip(found, original, strict=True)),
        "same_greedy_answers": f"{sum(a == b for a, b in zip(answers, expected, strict=True))} of {len(asked)}",
        "same_text_ids": f"{sum(same_ids)} of {len(TEXTS)}",
    }
    llama.close()
    return result


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def loud_gemma_1(folder: Path) -> Path:
    """A tiny Gemma 1 (multi-query attention, N * H != D) with amplified random weights and the tiny tokenizer."""
    from gemma_ft.data.encode.tokenizer import load_tokenizer
    from gemma_ft.data.encode.tokenizer_files import save_tokenizer
    from gemma_ft.families.records import PRESETS
    from gemma_ft.model.gemma import GemmaForCausalLM

    tokenizer = load_tokenizer(str(ROOT / "data" / "gemma-tiny"))
    small = {"num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4,
             "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 2048}  # fmt: skip
    model = GemmaForCausalLM(PRESETS["gemma-2b"].config(vocab_size=len(tokenizer), **small))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            spread = 0.4 if "norm" in name else 1.5 / weight.shape[-1] ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    model.save_pretrained(str(folder))
    save_tokenizer(tokenizer, folder, system_policy="fold")
    return folder


def gemma_ft(*arguments: str) -> str:
    """Run the command line; returns the command as a user would type it."""
    subprocess.run([sys.executable, "-m", "gemma_ft", *arguments], cwd=ROOT, check=True)
    return " ".join(["gemma-ft", *arguments])


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description="Compare llama.cpp with our model on exported GGUF files.")
    parser.add_argument("--run", type=Path, help="A finished run of recipes/sft_tiny.yaml.")
    options = parser.parse_args()
    if fault := next(filter(None, map(amx_fault, TYPES)), None):
        sys.exit(f"{fault}; measure on another processor")
    commands = ["gemma-ft train recipes/sft_tiny.yaml output_dir=RUN"]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        run = options.run or scratch / "run"
        if options.run is None:
            gemma_ft("train", "recipes/sft_tiny.yaml", f"output_dir={run}")
        commands.append("gemma-ft export RUN --to hf --out HF --dtype f32")
        gemma_ft("export", str(run), "--to", "hf", "--out", str(scratch / "hf"), "--dtype", "f32")
        models = {"tuned tiny Gemma 2": scratch / "hf", "random tiny Gemma 1": loud_gemma_1(scratch / "gemma1")}
        for name, folder in models.items():
            for kind in TYPES:
                path = scratch / f"{folder.name}-{kind}.gguf"
                gemma_ft("export", str(folder), "--to", "gguf", "--gguf-type", kind, "--out", str(path))
                results.setdefault(name, {})[kind] = compare(folder, path, QUESTIONS)
    commands += ["gemma-ft export HF --to gguf --gguf-type TYPE --out FILE.gguf", "python -m benchmarks.llama_cpp"]
    write_result("llama_cpp", also=("llama-cpp-python", "gguf"), commands=commands, models=results)


if __name__ == "__main__":
    main()
