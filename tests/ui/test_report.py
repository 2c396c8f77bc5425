"""The page of a run: whole, self-contained, the same each time, and nothing in it that comes alive."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest

from gemma_ft.errors import UserError
from gemma_ft.recipe.load import load_recipe
from gemma_ft.train.lengths import length_histogram
from gemma_ft.train.run_dir import RunDir
from gemma_ft.ui.pages.comparison import write_comparison
from gemma_ft.ui.pages.curves import MOST_POINTS, smoothed, thinned
from gemma_ft.ui.pages.page import write_report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}\x1b[31mred\x1b[0m\u202egnp"
SHOWN = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}redgnp"  # as text
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "section", "div", "table", "thead",
    "tbody", "tr", "th", "td", "img", "pre", "dl", "dt", "dd", "footer",
}  # fmt: skip
SUMMARY = {
    "steps": 40, "tokens": 12345, "seconds": 61.5, "tokens_per_second": 200.7, "peak_bytes": 3 * 2**30,
    "train_loss": 0.25,
    "eval_before": {"loss": 2.5, "exact_match": 0.0}, "eval_after": {"loss": 0.5, "exact_match": 0.875},
    "gain": 2.0, "canary_loss": 3.75, "canary_base_loss": 3.5, "forgetting": 0.25, "forgetting_note": None,
    "result": "adapter", "device": "a fast one", "versions": {"python": "3.11", "torch": "2.13"},
    "samples": [{"prompt": "Why?", "expected": "Because.", "before": "No.", "after": "Because."}],
    "data": {"rows": 9, "documents": 8, "packed_rows": 4, "tokens": 700, "trained_tokens": 350, "truncated": 2,
             "max_seq_len": 200},
    "lengths": {"bin_tokens": 10, "documents": [0, 3, 5]},
}  # fmt: skip
EVALUATION = {
    "rows": 100,
    "models": {
        "base": {"loss": {"value": 2.5, "low": 2.25, "high": 2.75, "rows": 100}, "exact_match": {"value": 0.0}},
        "adapter": {"exact_match": {"value": 0.875, "low": 0.8, "high": 0.95}},
    },
    "differences": [
        {"of": "adapter", "minus": "base", "metric": "exact_match", "value": 0.875, "low": 0.8, "high": 0.95},
    ],
    "tasks": {"adapter": {"gsm": {"acc": {"value": 0.5, "low": None, "high": None}}}},
    "samples": [{"prompt": "Where?", "expected": "Here.", "answers": {"base": "There.", "adapter": "Here."}}],
}  # fmt: skip
MERGE = {
    "policy": "original",
    "dtype": "bfloat16",
    "certificate": {
        "prompts": 8, "positions": 301, "passed": True,
        "merged": {"mean_kl": 0.000107}, "compared": {"dequantized": {"mean_kl": 2.4e-08}},
        "limit": {"measure": "mean_kl", "at_most": 0.1, "why": "trained over quantized weights"},
    },
}  # fmt: skip


class Seen(HTMLParser):
    """Every tag with its attributes, and the text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "style":
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        self.text += f" {data}" if not self._inside else ""

    @property
    def pictures(self) -> list[str]:
        """The SVG of each picture."""
        prefix = "data:image/svg+xml;base64,"
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix)).decode() for source in sources]


def laid_over(path: Path, figures: dict[str, Any]) -> None:
    """Other figures in the place of those that a verb wrote to a file of JSON, under keys that it has."""
    written = json.loads(path.read_text())
    check_known(figures, written)
    path.write_text(json.dumps({**written, **figures}))


def check_known(given: dict[str, Any], written: dict[str, Any]) -> None:
    """That every key is one that is really written; where the keys are names of the user's, none is."""
    unknown = given.keys() - written.keys()
    assert not unknown or unknown == given.keys(), unknown
    for key in given.keys() & written.keys():
        both = (given[key], written[key])
        one, other = ((found[:1] or [None])[0] if isinstance(found, list) else found for found in both)
        if isinstance(one, dict) and isinstance(other, dict):
            check_known(one, other)


def lines_like(path: Path, lines: list[dict[str, Any]], torn: str = "") -> None:
    """Lines in the place of those that a run wrote, with its keys and the values given; `torn`: the last, cut off."""
    written = json.loads(path.read_text().splitlines()[0])
    assert all(line.keys() <= written.keys() for line in lines), path.name
    path.write_text("".join(json.dumps({**written, **line}) + "\n" for line in lines) + torn)


def make_run(
    finished_run: Path, root: Path, *settings: str, steps: int = 40, summary: Any = SUMMARY, name: str = "run"
) -> Path:
    """A run as training left it, with settings of its recipe and figures of its own; `summary`: None, not finished."""
    out, of = RunDir(root / name), RunDir(finished_run)
    out.write_recipe(load_recipe(of.recipe, [f"output_dir={out.root}", *settings]).recipe)
    for path in (of.metrics, of.evals, of.samples, of.summary):
        shutil.copy(path, out.root)
    figures = [
        {
            "step": step,
            "loss": 2.5 / step + (50.0 if step == 1234 else 0.0),
            "learning_rate": 1e-3,
            "grad_norm": None,
            "tokens_per_second": 200 + step % 7,
        }
        for step in range(1, steps + 1)
    ]
    lines_like(out.metrics, figures, torn='{"step": 99, "lo')
    lines_like(out.evals, [{"step": 20, "eval_loss": 1.0, "canary_loss": 3.6, "canary_base_loss": 3.5}])
    answers = [{"prompt": "Why?", "expected": "Because.", "answer": f"at {step}", "step": step} for step in (0, 20, 40)]
    lines_like(out.samples, answers)
    if summary is None:
        out.summary.unlink()
    else:
        laid_over(out.summary, summary)
    return out.root


def measured(finished_run: Path, run: Path, *, evaluation: Any = EVALUATION, merge: Any = MERGE) -> None:
    """Give a run what `gemma-ft eval` and `gemma-ft merge` wrote, with figures of its own; None: without that file."""
    of, out = RunDir(finished_run), RunDir(run)
    for source, path, figures in (
        (of.eval_results, out.eval_results, evaluation),
        (of.certificate, out.certificate, merge),
    ):
        if figures is not None:
            shutil.copy(source, path)
            laid_over(path, figures)


def seen(run: Path) -> Seen:
    return Seen(write_report(run, run / "report.html").read_text(encoding="utf-8"))


def test_everything_a_run_has_to_say_is_on_its_page(finished_run: Path, tmp_path: Path) -> None:
    run = make_run(finished_run, tmp_path / "my runs")
    measured(finished_run, run)
    page = seen(run)
    for expected in (
        "held-out loss 0.5000 before: 2.5000", "exact match 87.5% before: 0.0%",
        "forgetting +0.2500 canary loss: 3.5000 → 3.7500", "12,345 tokens in 61.5 s", "201 tokens/s", "3.00 GiB",
        "held-out rows 2.5000 0.5000 gain +2.0000", "canary rows 3.5000 3.7500 forgetting +0.2500",
        "Why? before No. after Because. expected Because.", "step 0 at 0 step 20 at 20 step 40 at 40",
        "exact match 0.0% 87.5% [80.0%, 95.0%]", "loss ↓ 2.5000 [2.2500, 2.7500] –",
        "differences adapter − base exact match +87.5%* [+80.0%, +95.0%]", "gsm: acc – 0.5000",
        "Where? base There. adapter Here. expected Here.",
        "mean kl 0.000107 2.4e-08", "Passed: mean kl may be 0.1 at most (trained over quantized weights).",
        "9 rows -> 8 sequences, 700 tokens, 50% trained", "2 cut at max_seq_len", 'preset: gemma-tiny',
        "device a fast one", "torch 2.13", f"gemma-ft eval '{run}'", f"gemma-ft merge '{run}' --out '{run}'/merged",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert len(page.pictures) == 5  # loss, two rates (no gradient norm is known), canary, lengths
    assert "not come to its end" not in page.text


def test_it_needs_nothing_but_itself(finished_run: Path, tmp_path: Path) -> None:
    page = seen(make_run(finished_run, tmp_path))
    assert {tag for tag, _ in page.tags} <= TAGS
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {"lang", "charset", "name", "content", "http-equiv", "class", "src", "alt"}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for picture in page.pictures:  # nothing is loaded: what is named by an address is a format or a licence
        assert not re.search(r'(?:href|src)="(?!#)', picture)


def test_the_same_run_gives_the_same_bytes(finished_run: Path, tmp_path: Path) -> None:
    run = make_run(finished_run, tmp_path)
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert write_report(run, tmp_path / "b.html").read_bytes() == first
    for picture in Seen(first.decode()).pictures:
        assert "<dc:date>" not in picture
        assert "<dc:creator>" not in picture


def test_text_of_others_only_shows(finished_run: Path, tmp_path: Path) -> None:
    sample = {"prompt": HOSTILE, "expected": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    summary = {
        **SUMMARY,
        "samples": [sample],
        "device": HOSTILE,
        "forgetting_note": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
    }
    run = make_run(finished_run, tmp_path, summary=summary)
    recipe = load_recipe(run / "recipe.yaml").recipe
    RunDir(run).write_recipe(recipe.model_copy(update={"output_dir": HOSTILE}))
    lines_like(run / "samples.jsonl", [{"step": 0, "prompt": HOSTILE, "answer": HOSTILE}])
    answers = {"prompt": HOSTILE, "expected": HOSTILE, "answers": {HOSTILE: HOSTILE}}
    evaluation = {**EVALUATION, "models": {HOSTILE: {HOSTILE: {}}}, "samples": [answers]}
    measured(finished_run, run, evaluation=evaluation, merge={**MERGE, "policy": HOSTILE})
    page = seen(run)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(SHOWN) >= 12
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_a_name_is_no_formula_and_no_markup(finished_run: Path, tmp_path: Path) -> None:
    names = ["$\\frac{1}$ <b>x</b>", "日本 & more"]
    roots = [make_run(finished_run, tmp_path, name=name.replace("/", "∕")) for name in names]
    page = Seen(write_comparison(roots, tmp_path / "out.html").read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags} <= TAGS
    assert "日本 & more" in page.text


@pytest.mark.parametrize(
    "summary",
    [
        None,
        {"steps": 40},
        {**SUMMARY, "eval_before": 3, "eval_after": [], "samples": {"a": 1}, "data": "x", "versions": []},
        {**SUMMARY, "samples": [1, {"prompt": None}], "lengths": {"documents": "many"}, "steps": "x", "device": 4},
        {**SUMMARY, "lengths": {"documents": [1, None], "bin_tokens": 3}, "data": {"rows": "x"}, "peak_bytes": True},
        {**SUMMARY, "lengths": {"documents": [1, 2]}, "gain": float("nan"), "canary_loss": None, "forgetting": "much"},
    ],
)
def test_a_page_is_made_of_whatever_is_there(finished_run: Path, tmp_path: Path, summary: Any) -> None:
    run = make_run(finished_run, tmp_path, summary=summary)
    for name in ("eval.json", "merge.json"):
        (run / name).write_text(
            '{"models": {"base": 3}, "differences": 3, "samples": [3], "certificate": {"limit": 3}}'
        )
    page = seen(run)
    assert "Loss per token by step" in [attributes.get("alt") for _, attributes in page.tags]
    if summary is None:
        assert "steps so far 40" in page.text
        assert "This run has not come to its end: figures are those so far." in page.text
        assert f"gemma-ft train {run / 'recipe.yaml'} --resume" in page.text


def test_a_long_run_is_thinned_and_keeps_its_spikes(finished_run: Path, tmp_path: Path) -> None:
    run = make_run(finished_run, tmp_path, steps=20_000)
    write_report(run, run / "report.html")
    assert (run / "report.html").stat().st_size < 600_000
    points = [(step, 2.5 / step + (50.0 if step == 1234 else 0.0)) for step in range(1, 20_001)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert (1234, 50.0 + 2.5 / 1234) in kept
    assert {points[0], points[-1]} <= set(kept)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_smoothing_keeps_level_slope_and_steps() -> None:
    straight = [(step, 3.0 * step) for step in range(300)]
    assert [value for _, value in smoothed(straight)] == pytest.approx([value for _, value in straight])
    steep = [(step, 2.0**-step) for step in range(300)]
    assert [value for _, value in smoothed(steep, geometric=True)] == pytest.approx([v for _, v in steep])
    noisy = smoothed([(step, float(step % 2)) for step in range(300)])
    assert all(abs(value - 0.5) < 0.1 for _, value in noisy[5:-5])


def test_lengths_are_counted_by_document() -> None:
    assert length_histogram(numpy.bincount([3, 24, 25, 48])) == {
        "bin_tokens": 2,
        "documents": [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    }
    assert length_histogram(numpy.bincount([1])) == {"bin_tokens": 1, "documents": [1]}


def test_runs_are_compared_by_figures_recipes_and_answers(finished_run: Path, tmp_path: Path) -> None:
    one = make_run(finished_run, tmp_path, "train.learning_rate=0.1", name="one")
    better = {**SUMMARY, "eval_after": {"loss": 0.25, "exact_match": 1.0}, "seconds": 7400}
    two = make_run(finished_run, tmp_path, "train.learning_rate=0.2", name="two", summary=better)
    three = make_run(finished_run, tmp_path, "strategy=qlora", name="three", summary=None)
    measured(finished_run, two, merge=None)
    page = Seen(write_comparison([one, two, three], tmp_path / "out.html").read_text(encoding="utf-8"))
    for expected in (
        "3 runs compared one, two, three", "held-out loss 0.5000 0.2500 –", "exact match 87.5% 100.0% –",
        "time in steps 61.5 s 2 h 03 min –", "train.learning_rate 0.1 0.2 0.002", "quantize.kind – – nf4",
        "strategy lora lora qlora",
        "two: adapter", "Why? one Because. two Because. expected Because.",
        "three: This run has not come to its end: figures are those so far.",
    ):  # fmt: skip
        assert expected in page.text, expected
    recipes = page.text.split("What the recipes differ in")[1].split("Evaluation")[0]
    assert "output_dir" not in recipes
    assert "preset" not in recipes
    assert len(page.pictures) == 4
    same = Seen(write_comparison([one, one], tmp_path / "same.html").read_text(encoding="utf-8"))
    assert "In nothing but where they wrote." in same.text
    assert f"{one}, {one}" in same.text  # equal names: the paths tell them apart


def test_older_results_are_told(finished_run: Path, tmp_path: Path) -> None:
    import os

    run = make_run(finished_run, tmp_path)
    measured(finished_run, run, merge=None)
    os.utime(run / "eval.json", (1, 1))
    assert "eval.json is older than the end of this run: run gemma-ft eval again." in seen(run).text


def test_a_recipe_of_another_version_is_shown_as_it_is(finished_run: Path, tmp_path: Path) -> None:
    run = make_run(finished_run, tmp_path)
    with (run / "recipe.yaml").open("a") as file:
        file.write("of_tomorrow: 1\n")
    page = seen(run)
    assert "recipe.yaml is shown as it is, for this version cannot read it: " in page.text
    assert "of_tomorrow: unknown key" in page.text
    assert "preset: gemma-tiny" in page.text
    assert "gemma-tiny · lora" in page.text
    assert f"gemma-ft merge {run} --out {run}/merged" in page.text
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("strategy: lora", "strategy: full"))
    assert "gemma-ft merge" not in seen(run).text


def refusal(root: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        write_report(root, out)
    return str(caught.value)


def test_what_is_no_run_and_what_is_no_report(finished_run: Path, tmp_path: Path) -> None:
    run, out = make_run(finished_run, tmp_path), tmp_path / "out.html"
    assert refusal(tmp_path, out) == (
        f"{tmp_path}: holds no run: no recipe.yaml in it; name the output_dir of a training run"
    )
    mine = tmp_path / "mine.html"
    mine.write_text("<html>my page</html>")
    assert refusal(run, mine) == f"{mine}: is there and is no report; name another file with --out"
    assert refusal(run, tmp_path) == f"{tmp_path}: is there and is no report; name another file with --out"
    blocked = mine / "x.html"
    assert refusal(run, blocked) == f"{blocked}: cannot be written: File exists; name another file with --out"
    (run / "merge.json").write_text("[1]")
    assert refusal(run, out) == f"{run}/merge.json: expected a JSON object; write it again, or remove it"
    (run / "eval.json").write_text("{")
    assert refusal(run, out) == f"{run}/eval.json: is no JSON; write it again, or remove it"
    (run / "recipe.yaml").write_text("{")
    assert refusal(run, out) == f"{run}/recipe.yaml: is no YAML; restore it from the recipe that was run"
    (run / "recipe.yaml").write_bytes(b"\xff\xfe")
    assert refusal(run, out) == f"{run}/recipe.yaml: cannot be read: not UTF-8"
    assert not out.exists()
