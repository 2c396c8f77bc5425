"""The certificate: what it measures is right, exact merges are exact, and a merge beyond its limit leaves nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from gemma_ft import load_tokenizer
from gemma_ft.build.located import Source
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_base, load_model
from gemma_ft.errors import NonFiniteError, UserError
from gemma_ft.export.merge import certificate as room
from gemma_ft.export.merge.certificate import (
    FLOAT32,
    REQUANTIZED,
    ROUNDED,
    BeyondLimit,
    Distance,
    certify,
    distance,
    limit_for,
    live_model,
)
from gemma_ft.export.merge.certificate_prompts import CertificatePrompt, certificate_prompts
from gemma_ft.export.merge.merge import merge_to_folder
from gemma_ft.export.merge.merged import merged_weights
from gemma_ft.recipe.load import load_recipe
from gemma_ft.train.run_dir import RunDir
from tests.export.tuned import ROOT, names_in, save_tuned, wrap

PROBES = [CertificatePrompt([2, 9, 8, 7, 30, 5], [1, 2, 4]), CertificatePrompt([2, 40, 41], [0, 1])]


def run_of(tmp_path: Path, base: Path, *overrides: str, **settings: Any) -> Path:
    """A run directory as training leaves it: the recipe as it writes one, and an adapter with its contract."""
    recipe = load_recipe(ROOT / "recipes" / "sft_tiny.yaml", ["data.max_seq_len=128", *overrides]).recipe
    run = tmp_path / "run"
    RunDir(run).write_recipe(recipe)
    model = load_base(Source(str(base), None), dtype=torch.float32)
    stored = {"quantize": recipe.quantize.kind if recipe.quantize else None, "precision": recipe.train.precision}
    save_tuned(run / "adapter", base, model, **stored, **settings)
    return run


def test_a_distance_is_what_its_name_says(base: Path, base_bf16: Path) -> None:
    """Against the formulas written out, over all logits at once."""
    live, other = (load_base(Source(str(one), None), dtype=torch.float64).eval() for one in (base, base_bf16))
    found = distance(live, other, PROBES)
    with torch.no_grad():
        p, q = (torch.cat([model(torch.tensor([one.ids])).logits[0, one.positions] for one in PROBES]).double()
                for model in (live, other))  # fmt: skip
    kl = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-6)
    assert found.max_kl == pytest.approx(float(kl.max()), rel=1e-6)
    assert found.max_abs_dlogit == pytest.approx(float((p - q).abs().max()), rel=1e-6)
    assert found.relative_dlogit == pytest.approx(float((p - q).abs().max() / p.abs().max()), rel=1e-6)
    assert found.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0 < found.mean_kl < found.max_kl


@pytest.mark.parametrize("side", ["live", "merged"])
def test_logits_that_are_not_finite_are_no_distance(side: str, base: Path) -> None:
    """`max` lets a NaN through: such a merge would be certified as exact."""
    models = {name: load_base(Source(str(base), None), dtype=torch.float32).eval() for name in ("live", "merged")}
    with torch.no_grad():
        models[side].model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        distance(models["live"], models["merged"], PROBES)
    assert str(caught.value) == (
        f"the logits of the {side} model are not finite; give the adapter a smaller weight, or look for a damaged "
        "adapter or base"
    )


def test_positions_are_compared_a_few_at_a_time(base: Path, base_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, other = (load_base(Source(str(one), None), dtype=torch.float64).eval() for one in (base, base_bf16))
    whole = distance(live, other, PROBES)
    monkeypatch.setattr(room, "POSITIONS_AT_ONCE", 1)
    cut = distance(live, other, PROBES)
    assert vars(cut) == pytest.approx(vars(whole), rel=1e-5)


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_float32_merge_of_a_lora_is_exact(kind: dict[str, Any], base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, base, "strategy=lora", "train.precision=float32", **kind)
    facts = merge_to_folder(place_of(run), tmp_path / "out", certify=partial(certify, prompts=4))
    found = facts.certificate
    assert found is not None
    assert found["limit"] == vars(FLOAT32)
    assert 0 < found["merged"]["relative_dlogit"] <= 5e-6
    assert (found["passed"], found["prompts"], found["compared"]) == (True, 4, {})
    assert found["rows"] == "data/scheduling_eval.jsonl"
    assert found["live"] == {"quantize": None, "compute": "float32"}


def test_the_dequantized_float32_merge_of_nf4_is_exact_and_the_original_is_not(base: Path, tmp_path: Path) -> None:
    place = place_of(run_of(tmp_path, base, "train.precision=float32"))
    seen: list[tuple[int, int]] = []
    check = partial(certify, prompts=2, on_progress=lambda *step: seen.append(step))
    facts = merge_to_folder(place, tmp_path / "out", policy="dequantized", certify=check)
    found = facts.certificate
    assert found is not None
    assert found["limit"] == vars(FLOAT32)
    assert found["merged"]["relative_dlogit"] <= 5e-6
    assert found["compared"].keys() == {"base", "original"}
    assert found["compared"]["original"]["mean_kl"] > 1e6 * found["merged"]["mean_kl"]
    assert found["compared"]["base"]["mean_kl"] > 1e6 * found["merged"]["mean_kl"]
    assert seen == [(number, 6) for number in range(1, 7)]
    source, merged = Source(str(base), None), merged_weights(place)
    quantized = wrap(load_base(source, dtype=torch.float32, quantize="nf4").eval())
    plain = load_base(source, dtype=torch.float32).eval()
    alone = distance(quantized, plain, certificate_prompts(merged, 2).prompts, without=True)
    assert found["compared"]["base"] == vars(alone)


@pytest.mark.parametrize(
    ("policy", "dtype", "overrides", "limit"),
    [
        ("original", None, ["strategy=lora", "train.precision=float32"], FLOAT32),
        ("original", torch.bfloat16, ["strategy=lora", "train.precision=float32"], ROUNDED),
        ("original", None, ["strategy=lora", "train.precision=bf16"], ROUNDED),
        ("original", None, ["train.precision=float32"], REQUANTIZED),
        ("dequantized", None, ["train.precision=float32"], FLOAT32),
        ("dequantized", torch.bfloat16, ["train.precision=float32"], ROUNDED),
        ("dequantized", None, ["quantize=int8", "train.precision=float32"], REQUANTIZED),
    ],
)
def test_the_limit_follows_from_what_was_trained_and_written(
    policy: Any, dtype: torch.dtype | None, overrides: list[str], limit: Any, base: Path, tmp_path: Path
) -> None:
    place = place_of(run_of(tmp_path, base, *overrides))
    assert limit_for(merged_weights(place, policy=policy, dtype=dtype)) is limit


def test_on_random_tokens_the_limit_is_what_quantizing_costs_there(first_base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, first_base)
    (run / "recipe.yaml").unlink()
    found = merge_to_folder(place_of(run), tmp_path / "out", certify=partial(certify, prompts=2)).certificate
    assert found is not None
    alone = found["compared"]["base"]["mean_kl"]
    assert found["limit"] == {
        "measure": "mean_kl", "at_most": 2 * alone, "why": "random tokens: twice what quantizing the base costs there",
    }  # fmt: skip
    assert 0.1 < found["merged"]["mean_kl"] <= 2 * alone
    merged, exact = (merged_weights(place_of(run), policy=policy) for policy in ("original", "dequantized"))
    assert limit_for(merged, Distance(0.04, 1.0, 1.0, 1.0, 1.0)) is REQUANTIZED
    assert limit_for(exact, Distance(1.0, 1.0, 1.0, 1.0, 1.0)) is FLOAT32


def test_beyond_the_limit_nothing_is_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(run_of(tmp_path, base, "train.precision=float32"))
    monkeypatch.setattr(room, "REQUANTIZED", room.Limit("mean_kl", 1e-9, "as a test"))
    with pytest.raises(BeyondLimit) as caught:
        merge_to_folder(place, tmp_path / "out", certify=partial(certify, prompts=2))
    value = caught.value.certificate["merged"]["mean_kl"]
    assert str(caught.value) == (
        f"the merged model is too far from the trained one: mean_kl {value:.3g}, at most 1e-09 (as a test); nothing "
        "was written; try --base dequantized, or --prompts 0 writes it without a certificate"
    )
    assert caught.value.exit_code == 1
    assert caught.value.certificate["passed"] is False
    assert names_in(tmp_path) == ["run"]


def test_a_weighted_sum_is_certified_against_the_sum_that_lives(base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, base, "strategy=lora", "train.precision=float32")
    model = load_base(Source(str(base), None), dtype=torch.float32)
    other = save_tuned(tmp_path / "other", base, model, seed=1, r=3, target_modules=["q_proj"])
    facts = merge_to_folder(
        place_of(run), tmp_path / "out", adapters=[(run, 0.5), (other, -2.0)], certify=partial(certify, prompts=2)
    )
    assert facts.certificate is not None
    assert facts.certificate["merged"]["relative_dlogit"] <= 5e-6
    assert [one["weight"] for one in facts.adapters] == [0.5, -2.0]


def test_a_weight_that_overflows_the_live_model_writes_nothing(base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, base, "strategy=lora", "train.precision=float32")
    with pytest.raises(NonFiniteError, match=r"^the logits of the live model are not finite; "):
        merge_to_folder(place_of(run), tmp_path / "out", adapters=[(run, 1e30)], certify=partial(certify, prompts=2))
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_live_model_is_the_one_that_is_served(quantize: str | None, base: Path, tmp_path: Path) -> None:
    """By the same layers, bit for bit: a certificate of another loader would say nothing of what answers."""
    strategy = "strategy=lora" if quantize is None else "strategy=qlora"
    place = place_of(run_of(tmp_path, base, strategy, "train.precision=float32"))
    live = live_model(merged_weights(place))
    served = load_model(place.adapter, dtype=torch.float32, quantize=quantize)
    ids = torch.tensor([PROBES[0].ids])
    with torch.no_grad():
        assert torch.equal(live(ids).logits, served(ids).logits)
    layers = [[type(one) for one in model.modules() if isinstance(one, LoraLayer)] for model in (live, served)]
    assert layers[0] == layers[1]


def test_what_is_not_served_is_not_certified(base: Path, tmp_path: Path) -> None:
    """An adapter that lacks a layer: PEFT leaves that one at its start, and the weights would agree with it."""
    run = run_of(tmp_path, base, "strategy=lora", "train.precision=float32")
    path = run / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({key: one for key, one in load_file(path).items() if key not in map(name.format, "AB")}, path)
    with pytest.raises(UserError) as served:
        load_model(run)
    with pytest.raises(UserError) as caught:
        merge_to_folder(place_of(run), tmp_path / "out", certify=partial(certify, prompts=2))
    assert str(caught.value) == str(served.value)
    assert str(caught.value) == (
        f"{path}: has no tensor {name.format('A')}; the adapter is not whole, or another base's"
    )
    assert names_in(tmp_path) == ["run"]


def test_probes_are_the_answers_of_held_out_rows(base: Path, tmp_path: Path) -> None:
    merged = merged_weights(place_of(run_of(tmp_path, base, "strategy=lora")))
    found = certificate_prompts(merged, 3)
    assert (len(found.prompts), found.source) == (3, "data/scheduling_eval.jsonl")
    tokenizer = load_tokenizer(merged.place.folder)
    rows = (ROOT / "data" / "scheduling_eval.jsonl").read_text(encoding="utf-8").splitlines()
    for prompt, row in zip(found.prompts, rows, strict=False):
        answer = tokenizer.decode([prompt.ids[place + 1] for place in prompt.positions])
        assert answer.removesuffix("<end_of_turn>") in row.replace('\\"', '"')
        assert answer.endswith("}<end_of_turn>")


def test_a_long_document_is_no_more_probes_than_asked_for(base: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text('{"text": "' + "one two three " * 400 + '"}\n')
    run = run_of(
        tmp_path,
        base,
        "strategy=lora",
        "eval.overlap=allow",
        f"data.eval={tmp_path / 'long.jsonl'}",
        f"data.train={tmp_path / 'long.jsonl'}",
    )
    found = certificate_prompts(merged_weights(place_of(run)), 1)
    assert (len(found.prompts), found.random) == (1, False)


@pytest.mark.parametrize(
    ("written", "cure"),
    [
        (torch.bfloat16, "try --dtype f32"),
        (torch.float32, "it was trained in bfloat16: train with train.precision=float32"),
    ],
)
def test_the_cure_of_rounding_is_one_that_was_not_taken(written: torch.dtype, cure: str) -> None:
    merged: Any = SimpleNamespace(infos={"a": (written, (2,))}, precision=torch.bfloat16)
    assert room._cure(merged, room.ROUNDED) == cure


def test_without_rows_random_tokens_stand_in_and_say_so(base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, base, "strategy=lora", "data.eval=gone.jsonl")
    found = certificate_prompts(merged_weights(place_of(run)), 3)
    assert found.source.startswith("random tokens: gone.jsonl")
    assert [len(prompt.ids) for prompt in found.prompts] == [64] * 3
    assert found.prompts == certificate_prompts(merged_weights(place_of(run)), 3).prompts
    assert len({tuple(prompt.ids) for prompt in found.prompts}) == 3
    (run / "recipe.yaml").unlink()
    assert certificate_prompts(merged_weights(place_of(run)), 1).source == "random tokens: the adapter lies in no run"
