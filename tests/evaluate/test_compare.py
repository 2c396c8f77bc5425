"""Base, adapter and merged side by side: agreement with the run's own summary, what is written, shown and refused."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from gemma_ft.build.weights import WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.evaluate.compare import EvalOptions
from gemma_ft.evaluate.models import ModelsToCompare, chosen_models, find_models
from gemma_ft.system import environment
from gemma_ft.system.shipped import shipped_root
from gemma_ft.ui.evaluation import evaluate_and_show
from tests.evaluate.conftest import Run, overrides


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


def evaluated(subject: ModelsToCompare, **options: Any) -> tuple[dict[str, Any], str, str]:
    """The results, and what stdout and stderr saw."""
    out, err = io.StringIO(), io.StringIO()
    consoles = {"stdout": Console(file=out, width=120), "stderr": Console(file=err, width=120)}
    results = evaluate_and_show(subject, EvalOptions(**options), **consoles)
    return results, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("strategy", ["qlora", "full"])
def test_a_finished_run_scores_as_its_summary_says(strategy: str, trained: Run) -> None:
    run = trained(strategy)
    results, out, err = evaluated(find_models(str(run)))
    assert results["settings"]["data"].endswith("rows.jsonl")
    assert (results["settings"]["max_rows"], results["settings"]["generate_rows"]) == (8, 3)
    summary = json.loads((run / "summary.json").read_text())
    tuned = "tuned" if strategy == "full" else "adapter"
    for name, before_or_after in (("base", "eval_before"), (tuned, "eval_after")):
        found, expected = results["models"][name], summary[before_or_after]
        assert found["loss"]["value"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["exact_match"]["value"] == expected["exact_match"]
        assert found["perplexity"]["value"] == pytest.approx(math.exp(expected["loss"]), rel=1e-5)
        assert (found["loss"]["rows"], found["exact_match"]["rows"]) == (8, 3)
    for kept, sample in zip(summary["samples"], results["samples"], strict=True):
        assert (kept["prompt"], kept["expected"]) == (sample["prompt"], sample["expected"])
        assert (kept["before"], kept["after"]) == (sample["answers"]["base"], sample["answers"][tuned])
    assert json.loads((run / "eval.json").read_text()) == results
    assert results["source"] == str(run)
    assert "12 held-out rows are training rows too: their scores mean little" in err
    assert f"results: {run / 'eval.json'}" in out


def test_what_eval_json_holds(trained: Run) -> None:
    run = trained("qlora")
    results, out, err = evaluated(find_models(str(run)))
    assert list(results) == ["source", "rows", "models", "differences", "samples", "tasks", "settings", "versions"]
    assert list(results["models"]) == ["base", "adapter", "merged"]
    metrics = ["loss", "perplexity", "exact_match", "json_valid", "json_equal"]
    for figures in results["models"].values():
        assert list(figures) == metrics
        assert all(set(figure) == {"value", "low", "high", "rows"} for figure in figures.values())
    pairs = [(one["of"], one["minus"], one["metric"]) for one in results["differences"]]
    order = (("adapter", "base"), ("merged", "base"), ("merged", "adapter"))
    assert pairs == [(*pair, metric) for pair in order for metric in metrics]
    gain = results["differences"][0]
    models = results["models"]
    assert gain["value"] == pytest.approx(models["adapter"]["loss"]["value"] - models["base"]["loss"]["value"])
    assert gain["high"] < 0  # three steps at a high rate are enough to be sure of
    assert abs(models["merged"]["loss"]["value"] - models["adapter"]["loss"]["value"]) < 0.2
    assert (results["settings"]["quantize"], results["settings"]["precision"]) == ("nf4", "float32")
    for text in ("adapter − base", "merged − adapter", "loss ↓", "json equal", "*", "excludes 0", "expected"):
        assert text in out
    assert [line.strip() for line in err.splitlines()[2:]] == [
        f"{name}: {what}" for name in ("base", "adapter", "merged") for what in ("loss", "answers")
    ]


def test_a_recipe_finds_its_run_and_a_bare_one_scores_the_base(trained: Run, rows: Path, tmp_path: Path) -> None:
    run = trained("qlora")
    assert find_models("sft_tiny", overrides(rows, run)).names == ["base", "adapter", "merged"]
    bare = find_models("sft_tiny", overrides(rows, tmp_path / "none", "strategy=lora"))
    results, out, _ = evaluated(bare, rows=2, metrics=["token_f1"])
    assert list(results["models"]) == ["base"]
    assert list(results["models"]["base"]) == ["loss", "perplexity", "token_f1"]
    assert (results["rows"], results["models"]["base"]["token_f1"]["rows"]) == (2, 2)
    assert results["differences"] == []
    assert "results: not written; --out FILE keeps them" in out
    assert not (tmp_path / "none").exists()


def test_folders_beside_a_recipe(trained: Run, rows: Path, tmp_path: Path) -> None:
    """An adapter folder on its own, and a merged folder that is none: the base itself, whose figures it then has."""
    adapter = trained("qlora") / "adapter"
    bare = overrides(rows, tmp_path / "none", "strategy=lora")
    bare = [one for one in bare if not one.startswith("adapter.")]
    subject = find_models("sft_tiny", bare, adapter=adapter, merged=shipped_root() / "data" / "gemma-tiny")
    assert subject.names == ["base", "adapter", "merged"]
    assert subject.quantize == ("nf4", True)  # the adapter's contract, not the recipe
    results, _, _ = evaluated(subject, rows=2, models=["merged"], out=tmp_path / "e.json")
    plain, _, _ = evaluated(find_models("sft_tiny", bare), rows=2)
    assert results["models"]["merged"] == plain["models"]["base"]
    assert json.loads((tmp_path / "e.json").read_text()) == results


@pytest.mark.parametrize("how", ["rows", "models", "metrics", "window", "overrides", "adapter", "merged", "recipe"])
def test_another_measurement_is_not_the_runs(
    how: str, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("qlora")
    monkeypatch.setattr("gemma_ft.evaluate.compare.with_each", _nothing_measured)
    monkeypatch.setattr("gemma_ft.ui.evaluation.show_results", lambda *_: None)
    (run / "eval.json").write_text("{}")
    options: dict[str, Any] = {
        "rows": {"rows": 2}, "models": {"models": ["base"]}, "metrics": {"metrics": ["exact_match"]},
        "window": {"window": 64, "stride": 8},
    }.get(how, {})  # fmt: skip
    places: dict[str, Any] = {
        "adapter": {"adapter": run / "adapter"}, "merged": {"merged": shipped_root() / "data" / "gemma-tiny"}
    }.get(how, {})  # fmt: skip
    subject = find_models(str(run), ["eval.max_rows=2"] if how == "overrides" else [], **places)
    if how == "recipe":  # another recipe of the same run, with other rows
        text = (run / "recipe.yaml").read_text()
        (tmp_path / "other.yaml").write_text(text.replace("max_rows: 8", "max_rows: 7"))
        subject = find_models(str(tmp_path / "other.yaml"))
        assert subject.names == ["base", "adapter", "merged"]
    _, out, _ = evaluated(subject, **options)
    assert out == "\nresults: not written; --out FILE keeps them\n"
    assert (run / "eval.json").read_text() == "{}"
    _, out, _ = evaluated(find_models(str(run)))
    assert out == f"\nresults: {run / 'eval.json'}\n"
    assert json.loads((run / "eval.json").read_text())["source"] == str(run)


def test_a_merged_folder_of_another_adapter_is_refused(trained: Run, tmp_path: Path) -> None:
    run, merged = trained("qlora"), tmp_path / "merged"
    shutil.copytree(shipped_root() / "data" / "gemma-tiny", merged)
    contract = json.loads((run / "adapter" / "gemma_ft.json").read_text())
    adapter, mine = run / "adapter", WeightFiles.open(run / "adapter", "adapter_model").fingerprint()

    def found(sha: str, **changed: str) -> str | None:
        (merged / "gemma_ft.json").write_text(json.dumps(contract | changed))
        (merged / "merge.json").write_text(json.dumps({"adapters": [{"sha256": sha}]}))
        try:
            find_models(str(run), merged=merged)
        except UserError as error:
            return str(error)
        return None

    cure = "give a merge of that adapter"
    assert found(mine) is None
    assert found("0" * 64) == f"--merged {merged}: was not made of {adapter}; {cure}"
    assert found(mine, base_sha256="0") == f"--merged {merged}: has another base than {adapter}; {cure}"
    assert found(mine, tokenizer_sha256="0") == f"--merged {merged}: has another tokenizer than {adapter}; {cure}"
    weights = load_file(str(merged / "model.safetensors"))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:1024].clone()
    save_file(weights, str(merged / "model.safetensors"))
    assert found(mine) == (
        f"--merged {merged}: has 1024 tokens, {shipped_root() / 'data' / 'gemma-tiny'} 2048; give a merge of it"
    )


def _nothing_measured(*_: object) -> None:
    pass


def test_a_file_that_cannot_be_written_loses_no_figure(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shown: list[object] = []
    monkeypatch.setattr("gemma_ft.evaluate.compare.with_each", _nothing_measured)
    monkeypatch.setattr("gemma_ft.ui.evaluation.show_results", lambda _, results: shown.append(results))
    monkeypatch.setattr("gemma_ft.evaluate.compare.replace_text", full)
    out = tmp_path / "e.json"
    assert refused(str(trained("qlora")), options={"out": out}) == (
        f"--out {out}: cannot be written: No space left on device; name another file"
    )
    assert len(shown) == 1


def refused(*arguments: Any, options: dict[str, Any] | None = None, **places: Any) -> str:
    with pytest.raises(UserError) as error:
        evaluated(find_models(*arguments, **places), **(options or {}))
    return str(error.value)


def test_what_cannot_be_evaluated(trained: Run, rows: Path, tmp_path: Path) -> None:
    run = trained("qlora")
    assert refused(str(tmp_path)) == (
        f"{tmp_path}: not a run, there is no recipe.yaml in it; give a run directory or a recipe"
    )
    half = tmp_path / "half"
    half.mkdir()
    (half / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert refused(str(half)) == (
        f"{half}: the run is not finished, there is no adapter/ or model/ in it; finish it first"
    )
    assert refused(str(run), ["data.eval=null"]) == (
        f"{run}: no held-out rows; set data.eval to a file of them, or data.eval_fraction to a share of data.train "
        "such as 0.1"
    )
    assert refused(str(run), merged=rows.parent) == (
        f"--merged {rows.parent}: no config.json in it; give a folder that gemma-ft merge wrote"
    )
    assert refused(str(run), options={"models": ["base", "tuned"]}) == (
        "--models: there is no 'tuned' here; there are base, adapter, merged"
    )
    assert refused(str(run), adapter=rows.parent) == (
        f"--adapter {rows.parent}: no adapter_config.json in it; name a PEFT adapter folder, or a run with one"
    )
    for text in ("model.preset=gemma-2b", "~quantize", "adapter.rank=4", "data.system=fold"):
        key = text.lstrip("~").partition("=")[0]
        assert refused(str(run), [text]) == (
            f"{key}: {run} was trained with its own, which an evaluation keeps; leave it out"
        )
    assert refused(str(run), options={"task_limit": 3}) == ("--task-limit: there are no tasks; name them with --tasks")
    assert refused(str(run), options={"out": tmp_path}) == f"--out {tmp_path}: is a folder; name a file"
    (tmp_path / "link").symlink_to(tmp_path / "e.json")
    assert refused(str(run), options={"out": tmp_path / "link"}) == f"--out {tmp_path / 'link'}: is a link; name a file"
    lost = tmp_path / "no" / "e.json"
    assert refused(str(run), options={"out": lost}) == f"--out {lost}: no such folder; make {lost.parent} first"
    assert refused(str(run), options={"metrics": ["numeric_match"]}) == (
        "--metrics: numeric_match needs a number after '####' in every held-out answer; leave it out"
    )
    words = [f"output_dir={tmp_path / 'none'}", f"data.train={rows}", f"data.eval={rows}", "eval.overlap=allow"]
    fresh = find_models("tiny_base", words)
    with pytest.raises(UserError) as error:
        chosen_models(fresh, None)
    assert str(error.value) == ("tiny_base: nothing to evaluate: fresh weights, and no finished run in its output_dir")


def test_a_run_whose_tokenizer_was_changed_is_refused(trained: Run, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained("qlora"), run)
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    assert refused(str(run)) == (
        f"{run / 'adapter'}: its chat template is not the one that was trained (gemma_ft.json); "
        "restore the tokenizer files that were saved with it"
    )
    assert (
        not (run / "eval.json").exists()
        or (run / "eval.json").read_bytes() == (trained("qlora") / "eval.json").read_bytes()
    )
