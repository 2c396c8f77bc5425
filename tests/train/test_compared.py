"""What a run over pairs is compared with is looked at before anything is built or written; and where a run says that
it starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.build.pretrained import load_tokenizer
from gemma_ft.errors import DiskError, UserError
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.reward import GemmaForSequenceClassification
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.start import check_reference
from tests.train.preference_runs import preference_recipe, write_pairs

Train = Callable[..., list[dict[str, Any]]]
Prefer = Callable[..., LoadedRecipe]


@pytest.fixture
def prefer(small_gemma: Path, tmp_path: Path) -> Prefer:
    pairs = write_pairs(tmp_path / "pairs.jsonl")

    def make(kind: str, *overrides: str) -> LoadedRecipe:
        return preference_recipe(small_gemma, pairs, tmp_path / "run", kind, "train.max_steps=1", *overrides)

    return make


def whole(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens_beside(folder: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(folder))


def reward_model(folder: Path, base: Path) -> Path:
    """A reward model whose head was trained."""
    model = GemmaForSequenceClassification.from_pretrained(str(base))
    model.score.weight.data.fill_(0.5)
    model.save_pretrained(str(folder))
    tokens_beside(folder, load_tokenizer(str(base)))
    return folder


def test_a_reference_that_is_none_is_refused_and_the_run_before_stays(
    prefer: Prefer, train: Train, small_gemma: Path, tmp_path: Path
) -> None:
    train(prefer("dpo"))
    before = whole(tmp_path / "run")
    reward = reward_model(tmp_path / "reward", small_gemma)
    messages = {
        "./nowhere": "./nowhere: no such folder; name a folder with a model, or a hub id (owner/name)",
        str(tmp_path / "pairs.jsonl"): f"{tmp_path}/pairs.jsonl: a file, not a folder; name a folder with a model, or "
        "a hub id (owner/name)",
        str(reward): f"{reward}: a reward model, which gives no log-probabilities; name the model that it was made "
        "from, or one that was tuned to answer",
    }
    for named, message in messages.items():
        with pytest.raises(UserError) as refused:
            train(prefer("dpo", f"objective.reference={named}"), overwrite=True)
        assert str(refused.value) == f"objective.reference: {message}"
    assert whole(tmp_path / "run") == before


def test_a_reference_with_another_tokenizer_is_refused(prefer: Prefer, small_gemma: Path, tmp_path: Path) -> None:
    """As many rows, and other pieces behind the ids: its log-probabilities would be of other texts."""
    other = tmp_path / "other"
    GemmaForCausalLM.from_pretrained(str(small_gemma)).save_pretrained(str(other))
    tokenizer = load_tokenizer(str(small_gemma))
    tokens_beside(other, tokenizer)
    file = other / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = saved["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    first, second = pieces[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(saved), encoding="utf-8")
    number = vocabulary[second]
    loaded = prefer("dpo", f"objective.reference={other}")
    with pytest.raises(UserError) as refused:
        check_reference(loaded.recipe, tokenizer)
    assert str(refused.value) == (
        f"objective.reference: {other}: has another tokenizer: id {number:,} is {second!r} there, and {first!r} here; "
        "name a model with the same one"
    )
    check_reference(prefer("dpo", f"objective.reference={small_gemma}").recipe, tokenizer)


def test_a_reference_may_have_fewer_rows_than_its_tokenizer_has_tokens(
    prefer: Prefer, train: Train, small_gemma: Path, tmp_path: Path
) -> None:
    """As Gemma 3 270M and 1B, whose last token is one of pictures and has no row."""
    folder, tokenizer = tmp_path / "more", load_tokenizer(str(small_gemma))
    GemmaForCausalLM.from_pretrained(str(small_gemma)).save_pretrained(str(folder))
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokens_beside(folder, tokenizer)
    (line,) = train(prefer("dpo", "strategy=lora", f"objective.reference={folder}", f"model.weights={folder}"))
    assert line["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_an_adapter_of_a_reward_model_is_not_gone_on_from(prefer: Prefer, train: Train, tmp_path: Path) -> None:
    train(prefer("reward"))
    done = (tmp_path / "run").rename(tmp_path / "reward")
    with pytest.raises(UserError) as refused:
        train(prefer("dpo", f"adapter.start={done}"))
    assert str(refused.value) == (
        f"adapter.start: {done}/adapter: a reward model's, which was never trained to answer; name an adapter that was"
    )


def start_lines(folder: Path) -> list[str]:
    lines = (folder / "console.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.startswith("  start ")]


def test_a_reward_model_may_begin_with_a_head_that_is_trained(
    prefer: Prefer, train: Train, small_gemma: Path, tmp_path: Path
) -> None:
    folder = reward_model(tmp_path / "reward", small_gemma)
    (line,) = train(prefer("reward", f"model.weights={folder}"))
    assert line["rewards/margins"] != 0
    assert start_lines(tmp_path) == [f"start      none: the head of {folder} is trained already"]
    assert "zero_proof" not in json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))


def test_a_reward_model_is_told_to_start_at_rewards_of_zero(prefer: Prefer, train: Train, tmp_path: Path) -> None:
    train(prefer("reward"))
    (told,) = start_lines(tmp_path)
    assert told.startswith("start      loss 0.693147 as it must be at the start; rewards and margins exactly 0, ")


def test_a_kto_run_logs_the_margin_of_both_means(prefer: Prefer, train: Train) -> None:
    lines = train(prefer("kto", "train.max_steps=2"))
    whole_steps = [line for line in lines if None not in (line["rewards/chosen"], line["rewards/rejected"])]
    assert whole_steps
    for line in whole_steps:
        assert line["rewards/margins"] == line["rewards/chosen"] - line["rewards/rejected"]


def test_a_run_without_held_out_rows_shows_no_empty_lines(prefer: Prefer, train: Train, tmp_path: Path) -> None:
    train(prefer("dpo", "eval.canary=null"))
    text = (tmp_path / "console.txt").read_text(encoding="utf-8")
    assert "–" not in text
    assert "What was learned" not in text


def test_log_probabilities_that_cannot_be_kept_are_told(
    prefer: Prefer, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "reference").write_text("a file where a folder is wanted")
    monkeypatch.setenv("GEMMA_FT_CACHE", str(cache))
    with pytest.raises(DiskError) as refused:
        train(prefer("dpo", "objective.reference=precomputed"))
    folder, _, rest = str(refused.value).partition(": ")
    assert Path(folder).parent == cache / "reference"
    assert rest == (
        "log-probabilities of the reference cannot be kept: Not a directory; free some, or set GEMMA_FT_CACHE to "
        "another folder"
    )
