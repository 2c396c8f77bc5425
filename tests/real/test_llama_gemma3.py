"""llama.cpp on the Gemma 3 files that we export: tiny ones in the proportions of every size, and Google's own 270M."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma_ft.build.pretrained import load_model
from gemma_ft.data.encode.tokenizer import ContentEncoder, load_tokenizer
from gemma_ft.export.export import ExportOptions, export_model
from gemma_ft.export.form_names import GgufType
from gemma_ft.infer.generate import generate_answers
from tests.export.gguf_files import SIZES, gguf, save_gemma_3
from tests.export.tuned import save_tuned
from tests.real import llama_child, llama_evaluate
from tests.real.corpus import SENTENCES, STRIKE_END, has_sign_run, lines

# Largest |difference| of logits over the largest |logit|. llama.cpp's GELU is a table of float16 (2^-11); before each
# product activations are rounded to the type of the weights. The folder's weights are on our side: the rounding of the
# file is in it.
WITHIN: dict[GgufType, float] = {"f32": 2e-3, "f16": 6e-3, "bf16": 6e-2, "q8_0": 1.2e-1}
REAL_WITHIN: dict[GgufType, float] = {"f32": 2e-3, "bf16": 3e-2}
CASES: list[tuple[str, GgufType]] = [(size, "f32") for size in SIZES]
CASES += [("gemma-3-270m", "f16"), ("gemma-3-270m", "bf16"), ("gemma-3-4b", "q8_0")]
BOS = 2
ANSWER_TOKENS = 200

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(llama_cpp: Path) -> Ask:
    """llama.cpp's answer about a file; `script`: the child that is asked."""

    def asked(file: Path, script: Any = llama_evaluate, **request: Any) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, script.__file__, str(file), str(llama_cpp)],
            input=json.dumps(request), capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        return cast(dict[str, Any], json.loads(done.stdout))

    return asked


def llama_logits(ask: Ask, file: Path, ids: list[int], first: int, **request: Any) -> tuple[Tensor, dict[str, Any]]:
    """[positions from `first` on, tokens], and the rest of the answer."""
    out = file.with_suffix(".logits")
    answer = ask(file, logits=[{"ids": ids, "from": first}], out=str(out), **request)
    logits = torch.from_numpy(np.fromfile(out, dtype=np.float32).reshape(answer["shapes"][0]))
    out.unlink()
    return logits, answer


@torch.no_grad()
def our_logits(model: Any, ids: list[int], first: int) -> Tensor:
    return cast(Tensor, model(torch.tensor([ids]), logits_to_keep=len(ids) - first).logits[0])


def exported(source: Path, out: Path, kind: GgufType) -> Path:
    export_model(str(source), ExportOptions(to="gguf", out=out, gguf_type=kind))
    return out


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def check_same_text(found: list[int], expected: list[int], logits: Tensor, error: float) -> None:
    """Equal, or different first where the two likeliest are nearer than `error` can move them."""
    place = next((i for i, ids in enumerate(zip(found, expected, strict=True)) if ids[0] != ids[1]), None)
    if place is not None:
        best = logits[place].topk(2).values
        assert float(best[0] - best[1]) <= 2 * error, (place, best)


def random_ids(count: int) -> list[int]:
    return [BOS, *torch.randint(7, 2048, (count - 1,), generator=torch.Generator().manual_seed(0)).tolist()]


@pytest.mark.parametrize(("size", "kind"), CASES)
def test_logits_of_every_proportion_are_ours(size: str, kind: GgufType, ask: Ask, tmp_path: Path) -> None:
    """Far past the window of 16: scaled RoPE or none (R14), D / N at 62 layers (D14), a padded table cut (D16)."""
    folder, ids = save_gemma_3(tmp_path / "base", size), random_ids(300)
    found, _ = llama_logits(ask, exported(folder, tmp_path / "x.gguf", kind), ids, 0)
    expected = our_logits(load_model(folder, dtype=torch.float32), ids, 0)
    assert found.shape == (300, 2048)
    error = difference(found, expected[:, :2048])
    print(f"{size} {kind}: {error:.2g} of the largest logit")
    assert error <= WITHIN[kind]


def test_d17_the_embedding_scale_is_not_rounded(ask: Ask, tmp_path: Path) -> None:
    """sqrt(96) = 9.798 in llama.cpp; in bf16 9.8125."""
    folder, ids = save_gemma_3(tmp_path / "base", "gemma-3-270m", dtype=torch.bfloat16), random_ids(60)
    found, _ = llama_logits(ask, exported(folder, tmp_path / "x.gguf", "f32"), ids, 0)
    model = load_model(folder, dtype=torch.float32)
    near = difference(found, our_logits(model, ids, 0))
    with torch.no_grad():
        embedded = model.get_input_embeddings().weight[torch.tensor([ids])] * 9.8125
        far = difference(found, model(inputs_embeds=embedded).logits[0])
    print(f"sqrt(D) as it is: {near:.2g}, rounded: {far:.2g}")
    assert near <= WITHIN["f32"]
    assert near < 0.7 * far


def test_a_final_cap_is_computed(ask: Ask, tmp_path: Path) -> None:
    """By this version of llama.cpp, from the file."""
    folder, ids = save_gemma_3(tmp_path / "base", "gemma-3-270m", final_logit_softcapping=5.0), random_ids(60)
    found, _ = llama_logits(ask, exported(folder, tmp_path / "x.gguf", "f32"), ids, 0)
    assert float(found.abs().max()) < 5.0
    assert difference(found, our_logits(load_model(folder, dtype=torch.float32), ids, 0)) <= WITHIN["f32"]


def test_a_merged_and_exported_model_answers_as_the_live_one(ask: Ask, tmp_path: Path) -> None:
    base = save_gemma_3(tmp_path / "base", "gemma-3-4b")
    tuned = save_tuned(tmp_path / "tuned", base, load_model(base, dtype=torch.float32))
    live, ids = load_model(tuned, dtype=torch.float32), random_ids(40)
    (answer,) = generate_answers(live, [ids], stop_ids=[], max_new_tokens=60, batch_size=1)
    export_model(str(tuned), ExportOptions(to="hf", out=tmp_path / "merged", dtype="f32"))
    for name, source in (("adapter", tuned), ("merged", tmp_path / "merged")):
        file = exported(source, tmp_path / f"{name}.gguf", "f32")
        found = ask(file, greedy=[{"ids": ids, "tokens": 60}])["answers"]
        assert found == [answer.ids], name
    untuned = load_model(base, dtype=torch.float32)
    assert generate_answers(untuned, [ids], stop_ids=[], max_new_tokens=60, batch_size=1) != [answer]


@dataclass(frozen=True)
class Answered:
    """The real 270M on a text: its greedy answer of ANSWER_TOKENS, past the window, and the logits that chose it."""

    prompt: list[int]
    answer: list[int]
    logits: Tensor


@pytest.fixture(scope="module")
def real(gemma3_270m: Path) -> Any:
    return load_model(gemma3_270m, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(gemma3_270m: Path) -> list[int]:
    """One sentence in 26 languages."""
    return [BOS, *ContentEncoder(load_tokenizer(str(gemma3_270m))).encode(" ".join(SENTENCES))]


@pytest.fixture(scope="module")
def answered(real: Any, prompt: list[int]) -> Answered:
    (answer,) = generate_answers(real, [prompt], stop_ids=[], max_new_tokens=ANSWER_TOKENS, batch_size=1)
    assert len(prompt) < 512 < len(prompt) + ANSWER_TOKENS
    whole = [*prompt, *answer.ids[:-1]]
    return Answered(prompt, answer.ids, our_logits(real, whole, len(prompt) - 1))


@pytest.mark.parametrize("kind", REAL_WITHIN)
def test_greedy_text_of_the_real_270m_is_ours(
    kind: GgufType, gemma3_270m: Path, answered: Answered, ask: Ask, tmp_path: Path
) -> None:
    """200 tokens, the last 110 or so with keys outside the window."""
    file, whole = exported(gemma3_270m, tmp_path / "x.gguf", kind), [*answered.prompt, *answered.answer[:-1]]
    asked = [{"ids": answered.prompt, "tokens": ANSWER_TOKENS}]
    found, said = llama_logits(ask, file, whole, len(answered.prompt) - 1, greedy=asked)
    error = float((found - answered.logits).abs().max())
    same = sum(a == b for a, b in zip(said["answers"][0], answered.answer, strict=True))
    print(f"{kind}: {difference(found, answered.logits):.2g} of the largest logit, {same} of {ANSWER_TOKENS} the same")
    assert difference(found, answered.logits) <= REAL_WITHIN[kind]
    check_same_text(said["answers"][0], answered.answer, answered.logits, error)
    file.unlink()


MEAN_KL, TOP_1 = 0.03, 0.90  # nats; share of positions. Found: 0.021 and 0.926


def test_the_original_file_has_our_distributions(
    real: Any, prompt: list[int], gemma3_270m_gguf: Path, ask: Ask, tmp_path: Path
) -> None:
    """Both have the weights of the file; llama.cpp rounds activations to 8 bits before each product."""
    file = tmp_path / "original.gguf"
    file.symlink_to(gemma3_270m_gguf)
    found, _ = llama_logits(ask, file, prompt, 64)
    expected = our_logits(real, prompt, 64)
    theirs, ours = found.log_softmax(-1), expected.log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean()
    top = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    print(f"original: mean KL {float(kl):.2g}, top-1 agreement {float(top):.4f}, {len(found)} positions")
    assert float(kl) <= MEAN_KL
    assert float(top) >= TOP_1


def test_ids_are_the_same_by_our_file_the_original_and_tokenizer_json(
    gemma3_tokenizer: Path, gemma3_270m: Path, gemma3_270m_gguf: Path, ask: Ask, tmp_path: Path
) -> None:
    """Of the corpus, but for runs of U+2581 and `</s>`, which llama.cpp takes for the end of an answer by its text; and
    with the original for texts that spell a control token: 15 of them, `<start_of_image>` for one, are text in it.
    """
    texts, tokenizer = lines(), load_tokenizer(str(gemma3_tokenizer))
    spelled = tokenizer.all_special_tokens + [
        str(one) for one in tokenizer.added_tokens_decoder.values() if one.special
    ]
    trained = ContentEncoder(tokenizer).encode_many(texts)
    ours = ask(exported(gemma3_270m, tmp_path / "x.gguf", "bf16"), llama_child, texts=texts)
    original = ask(gemma3_270m_gguf, llama_child, texts=texts)
    for found, left_out in ((ours, [STRIKE_END]), (original, [STRIKE_END, *spelled])):
        different = [text for text, *ids in zip(texts, trained, found["ids"], strict=True) if ids[0] != ids[1]]
        known = [text for text in different if has_sign_run(text) or any(name in text for name in left_out)]
        assert sorted(set(different) - set(known)) == []
    assert (ours["add_bos"], ours["bos"], ours["eos"], ours["eot"]) == (True, 2, 1, 106)
    assert ours["ends"] == {"1": "<eos>", "106": "<end_of_turn>", "212": STRIKE_END}
    modelfile = (tmp_path / "Modelfile").read_text()
    said = [line for line in modelfile.splitlines() if line.startswith("PARAMETER")]
    assert said == ['PARAMETER stop "<end_of_turn>"', 'PARAMETER stop "<eos>"', "PARAMETER repeat_penalty 1.0"]
    assert "Gemma Terms of Use" in modelfile


def test_pieces_are_the_originals(gemma3_tokenizer: Path, gemma3_270m_gguf: Path) -> None:
    """Text, kind and score of 262,144 tokens made of tokenizer.json's merges, beside those of Google's tokenizer.model.

    Other than there: runs of blanks, which merges make as they make all pieces (there: found first); <unk>, which has a
    kind of its own; `[multimodal]` and a few names of control tokens, which no text may become; and scores of pieces
    that nothing is merged to, which nobody reads.
    """
    from gemma_ft.export.gguf_pieces import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
    from gemma_ft.export.gguf_tokenizer import read_vocabulary

    fields = gguf.GGUFReader(str(gemma3_270m_gguf)).fields
    texts, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    found = read_vocabulary(load_tokenizer(str(gemma3_tokenizer)), rows=262_144, soft=("<image_soft_token>",))
    runs = range(138, 168)
    assert [found.tokens[id].replace("\u2581", " ") for id in runs] == [texts[id] for id in runs]
    assert [id for id in range(262_144) if found.tokens[id] != texts[id]] == [*runs]
    others = {id: (found.kinds[id], kinds[id]) for id in range(262_144) if found.kinds[id] != kinds[id]}
    assert [id for id, pair in others.items() if pair == (NORMAL, USER_DEFINED)] == [*runs]
    assert [id for id, pair in others.items() if pair == (UNKNOWN, CONTROL)] == [3]
    assert sum(pair == (CONTROL, USER_DEFINED) for pair in others.values()) == 15 == len(others) - 31
    merged = [id for id in range(262_144) if found.scores[id] != 0.0 and id not in runs]
    assert len(merged) > 230_000
    assert [id for id in merged if found.scores[id] != scores[id]] == []
