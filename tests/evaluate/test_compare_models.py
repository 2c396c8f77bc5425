"""Which models are compared, and how each is held: beside its own base, one after the other, whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.build.place import Place
from gemma_ft.evaluate import models as subjects
from gemma_ft.evaluate.models import ModelsToCompare, find_models, with_each
from gemma_ft.system import environment
from tests.evaluate.conftest import Run
from tests.evaluate.test_compare import evaluated, refused


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


def test_a_tuned_model_is_shown_beside_its_own_base(trained: Run, tmp_path: Path) -> None:

    run = tmp_path / "run"
    shutil.copytree(trained("full"), run)
    contract = json.loads((run / "model" / "gemma_ft.json").read_text())
    found = contract["base_sha256"][:12]
    contract["base_sha256"] = "0" * 64
    (run / "model" / "gemma_ft.json").write_text(json.dumps(contract))
    line = refused(str(run))
    assert line.startswith(f"{run / 'model'}: was trained on ")
    assert line.endswith(f" has {found} (gemma_ft.json); restore that base, or leave it out of --models")


def test_one_model_is_gone_before_the_next_is_loaded(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[Any] = []
    seen: list[tuple[str, int]] = []
    for name in ("load_model", "load_base", "model_at"):
        real = getattr(subjects, name)

        def load(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            seen.append(("load", sum(one() is not None for one in alive)))
            model = real(*args, **kwargs)
            alive.append(weakref.ref(model))
            return model

        monkeypatch.setattr(subjects, name, load)
    with_each(find_models(str(trained("qlora"))), ["base", "adapter", "merged"], lambda name, _: seen.append((name, 0)))
    assert seen == [("load", 0), ("base", 0), ("adapter", 0), ("load", 0), ("merged", 0)]


def test_a_live_model_is_not_packed_for_speed(trained: Run) -> None:
    """bitsandbytes' packed kernel rounds scales to bf16: the loss would not be the one that training reported."""
    from bitsandbytes.nn import Linear4bit

    flags: list[bool] = []

    def measure(_: str, model: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        flags.extend(layer.support_avx512bf16_for_cpu for layer in layers)

    with_each(find_models(str(trained("qlora")), ["train.precision=bf16"]), ["adapter"], measure)
    assert len(flags) == 42
    assert not any(flags)


def test_the_base_is_the_model_with_its_adapter_off(trained: Run) -> None:
    logits: dict[str, torch.Tensor] = {}
    ids = torch.tensor([[2, 40, 50, 60]])

    def measure(name: str, model: Any) -> None:
        with torch.no_grad():
            logits[name] = model(ids).logits

    with_each(find_models(str(trained("qlora"))), ["base", "adapter"], measure)
    bare = find_models(str(trained("qlora")))
    bare = ModelsToCompare(bare.recipe, "", None, Place(bare.place.base, None, None, None), None, None)
    with_each(bare, ["base"], lambda _, model: measure("alone", model))
    assert torch.equal(logits["base"], logits["alone"])
    assert not torch.allclose(logits["base"], logits["adapter"], atol=1e-3)


def test_documents_are_scored_in_windows(tmp_path: Path) -> None:
    text = tmp_path / "play.txt"
    text.write_text("First Citizen: Before we proceed any further, hear me speak.\nAll: Speak, speak.\n" * 12)
    subject = find_models(
        "sft_tiny",
        [f"data.train={text}", "data.eval=null", "data.eval_fraction=0.5", "data.max_seq_len=64", "strategy=lora",
         "eval.overlap=allow", f"output_dir={tmp_path / 'none'}"],
    )  # fmt: skip
    results, _, err = evaluated(subject, window=64, stride=16)
    base = results["models"]["base"]
    assert list(base) == ["loss", "perplexity"]
    assert base["loss"]["rows"] > 5  # windows: there is one row
    assert base["loss"]["low"] < base["loss"]["value"] < base["loss"]["high"]
    assert (results["rows"], results["samples"]) == (1, [])
    assert f"1 rows scored, 0 answered\n  a single document, in {base['loss']['rows']} windows" in err
    chunked, _, _ = evaluated(subject, window=64, stride=64)
    assert chunked["models"]["base"]["loss"]["value"] > base["loss"]["value"]  # a repeated text is easier with context
