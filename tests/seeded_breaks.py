"""Breaks that the suite has to see: a scale, a mask, a divisor, a rename without sync, each made in a copy of the
package, with the tests that must then fail.

    python -m tests.seeded_breaks [--only NAME] [--list]

It says whether the tests still bite after files were moved, renamed or rewritten; pytest does not collect it. A break
is found by its snippet, which stands once below gemma_ft/, and its test by name, which is defined in one file below
tests/: neither depends on where anything lies. A snippet or a test that is not found once is a failure. When code is
rewritten, mend its snippet to the line that now decides the same.

It needs a checkout of git, whose tracked files are copied as they are now, and takes about four minutes.
Exit code 0 when the tests pass unbroken and every break is seen red: tests that failed, not ones that could not run.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TESTS = "gemma_ft", "tests"
SECONDS = 900  # tests that take longer hang
# addopts of pyproject.toml say -q once; twice would leave out the line that is read here
PYTEST = [sys.executable, "-m", "pytest", "-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist",
          "-p", "no:randomly"]  # fmt: skip
NO_TESTS_RAN = {2: "interrupted", 3: "pytest failed", 4: "not collected", 5: "no test selected"}


@dataclass(frozen=True)
class Break:
    """`snippet` becomes `instead`, and then `test` must fail.

    `beside`: another test of its file, where several files define `test`. `case`: one of its parameters' ids.
    """

    name: str
    snippet: str
    instead: str
    test: str
    beside: str = ""
    case: str = ""


BREAKS = (
    # the model
    Break(
        "attention_scale",
        "scores = scores * scale\n",
        "scores = scores * scale * 1.01\n",
        "test_sdpa_equals_eager_and_both_equal_the_formula",
    ),
    Break(
        "attention_softcap",
        "scores = softcap * torch.tanh(scores / softcap)",
        "scores = softcap * torch.tanh(scores / (softcap + 1))",
        "test_fault_06_the_cap_comes_after_the_scale_and_before_the_mask",
    ),
    Break(
        "causal_mask",
        "visible = key <= query\n",
        "visible = key <= query + 1\n",
        "test_the_causal_window_shows_exactly_its_width",
    ),
    Break(
        "window_mask",
        "visible & (key > query - window_tokens)",
        "visible & (key >= query - window_tokens)",
        "test_the_causal_window_shows_exactly_its_width",
    ),
    Break(
        "document_mask",
        "visible = visible & (query_document[:, None, :, None] == key_document[:, None, None, :])",
        "pass",
        "test_padding_and_documents_hide_keys",
    ),
    Break(
        "embedding_scale",
        "torch.tensor(self.embedding_dim**0.5, dtype=dtype)",
        "torch.tensor(self.embedding_dim**0.5)",
        "test_fault_04_d17_the_embedding_scale_is_rounded_to_the_activation_dtype",
    ),
    Break(
        "rotary_halves",
        "torch.cat((-second, first), dim=-1) * sin",
        "torch.cat((second, -first), dim=-1) * sin",
        "test_in_float32_it_is_the_reference",
    ),
    Break(
        "norm_backward_in_cpp",
        "pull = dot * scale * scale * scale / float(D)",
        "pull = dot * scale * scale / float(D)",
        "test_in_float32_it_is_the_reference",
    ),
    Break(
        "key_value_ring",
        "(newest - (newest - places) % limit).clamp(min=-1)",
        "(newest - (newest - places) % (limit + 1)).clamp(min=-1)",
        "test_fault_14_cached_logits_equal_uncached_ones_past_the_wrap",
    ),
    Break(
        "rope_factor",
        "(rope.theta**-exponent / rope.factor)",
        "rope.theta**-exponent",
        "test_r14_the_factor_of_8_is_of_full_layers_alone_and_of_long_sizes_alone",
    ),
    Break(
        "key_norm",
        "query, key = self.q_norm(query), self.k_norm(key)",
        "query, key = self.q_norm(query), self.q_norm(key)",
        "test_queries_and_keys_are_normalized_head_by_head_and_then_turned",
    ),
    Break(
        "norm_of_an_imported_file",
        "yield values - 1.0 if self.minus_one else values",
        "yield values",
        "test_export_import_export_is_the_same_to_the_byte",
        beside="test_what_was_written_in_bf16_is_bf16_again",
    ),
    # the loss and the steps
    Break(
        "label_shift",
        "return hidden[:, :-1][labelled], targets[labelled]",
        "return hidden[:, 1:][labelled], targets[labelled]",
        "test_value_and_gradients_equal_plain_cross_entropy",
    ),
    Break(
        "weight_of_a_gradient",
        "scales = each.to(upstream.dtype) * upstream",
        "scales = each.to(upstream.dtype)",
        "test_one_pass_gives_what_two_give",
    ),
    Break(
        "reference_in_training_mode",
        "if not is_plain(layer) or layer.training:",
        "if not is_plain(layer):",
        "test_a_layer_in_training_mode_computes_as_it_trains",
    ),
    Break(
        "loss_divisor",
        "head.weight_sum if num_items_in_batch is None else num_items_in_batch",
        "head.weight_sum",
        "test_fault_27_any_cut_gives_the_gradient_of_the_whole_batch",
    ),
    Break(
        "warm_up",
        "return (step + 1) / warmup_steps",
        "return step / warmup_steps",
        "test_the_learning_rate_warms_up_and_never_is_zero",
    ),
    Break(
        "order_of_an_epoch",
        "self.seed * 1_000_003 + epoch",
        "self.seed * 1_000_003",
        "test_the_order_is_a_function_of_seed_and_epoch",
    ),
    Break(
        "divisors_of_terms",
        "within, after = (divisors, once[0])",
        "within, after = (once, divisors[0])",
        "test_gradients_are_those_of_autograd_over_full_logits",
        beside="test_no_cut_of_a_step_changes_it",
    ),
    Break(
        "preference_sign",
        "margin = self.beta * (chosen - rejected)",
        "margin = self.beta * (rejected - chosen)",
        "test_a_pair",
    ),
    Break(
        "odds_of_sure_answers",
        "a = mean_logprobs.clamp(max=SURE)",
        "a = mean_logprobs",
        "test_fault_p8_odds_of_a_sure_answer_are_no_nan",
    ),
    Break(
        "undesirable_answers",
        'torch.where(batch["sides"] == 1, ahead, -ahead)',
        "ahead",
        "test_kto_mirrors_a_good_answer_in_a_bad_one_about_z",
    ),
    Break(
        "random_state_of_a_step",
        "torch.manual_seed(_mixed(parts.seed, parts.step, number * parts.world.size + parts.world.rank))",
        "pass",
        "test_resumed_equals_uninterrupted",
        beside="test_a_damaged_checkpoint_is_passed_over",
        case="overrides0",
    ),
    # files
    Break(
        "rename_without_sync",
        "_sync(staging / name)",
        "pass",
        "test_what_appears_is_on_the_disk_before",
    ),
    Break(
        "text_written_in_place",
        'staging.write_text(text, encoding="utf-8")',
        'path.write_text(text, encoding="utf-8"), staging.write_text(text, encoding="utf-8")',
        "test_a_text_that_cannot_be_written_leaves_the_old_one_alone",
    ),
    Break(
        "hash_of_a_checkpoint",
        "if _fingerprint(folder / name) != expected:",
        'if _fingerprint(folder / name)["bytes"] != expected["bytes"]:',
        "test_every_damage_is_found",
    ),
    Break(
        "contract_of_a_vocabulary",
        "if encoder.content.sha256 != self.tokenizer_sha256:",
        "if not encoder.content.sha256:",
        "test_another_tokenizer_is_refused",
    ),
    # data
    Break(
        "packing_boundary",
        "at = bisect_left(rooms, length)",
        "at = bisect_left(rooms, length - 1)",
        "test_nothing_lost_nothing_twice_budget_kept",
    ),
    Break(
        "chat_loss_mask",
        "trained = said if learned else [IGNORE] * len(said)",
        "trained = text + [IGNORE] if learned else [IGNORE] * len(said)",
        "test_fault_17_answers_and_their_terminators_are_trained_and_nothing_else",
    ),
    Break(
        "special_token_guard",
        "            if token.content not in control]",
        "            if token.content not in set()]",
        "test_no_control_token_can_be_forged",
    ),
    Break(
        "padding_is_trained",
        '"labels": IGNORE, "position_ids": 0, "document_ids": PADDING',
        '"labels": pad_id, "position_ids": 0, "document_ids": PADDING',
        "test_batch_is_padded_at_the_right",
    ),
    # adapters and what is made of them
    Break(
        "gradient_of_lora",
        "grad_low = scaled_product(upstream, b, ctx.scaling)",
        "grad_low = scaled_product(upstream, b, 1.0)",
        "test_values_and_gradients_are_pefts",
    ),
    Break(
        "nested_nf4_offset_in_cpp",
        "to[i] += p.offset;",
        "to[i] += 0.0f;",
        "test_4_bit_weights_are_bitsandbytes_own_to_the_bit",
    ),
    Break(
        "merged_lora_scale",
        "weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=scale)",
        "weight.addmm_(b.to(weight.dtype), a.to(weight.dtype))",
        "test_one_layer_is_merged_as_peft_merges_it",
    ),
    Break(
        "norm_of_gguf",
        "values.float() + 1.0 if tensor.plus_one else values.float()",
        "values.float()",
        "test_every_weight_comes_back",
    ),
    # answers and figures
    Break(
        "stop_ids",
        "(self.control.eos, self.control.end_of_turn, *self._more_stop_ids)",
        "(self.control.eos, *self._more_stop_ids)",
        "test_fault_17_generation_stops_at_eos_and_end_of_turn",
    ),
    Break(
        "seed_of_a_request",
        "self._generator.manual_seed(sampling.seed)",
        "self._generator.seed()",
        "test_the_same_seed_gives_the_same_text_alone_and_in_a_batch",
    ),
    Break(
        "top_p",
        "TopPLogitsWarper(float(sampling.top_p))",
        "TopPLogitsWarper(float(sampling.top_p) ** 0.5)",
        "test_scores_equal_those_of_transformers_generate",
    ),
    Break(
        "interval_of_a_statistic",
        "tail = 100 * (1 - CONFIDENCE) / 2",
        "tail = 100 * (1 - CONFIDENCE)",
        "test_a_mean_has_scipys_interval",
    ),
    # the command line
    Break(
        "bound_of_a_recipe",
        "Share = Annotated[float, Field(ge=0, lt=1)]",
        "Share = Annotated[float, Field(ge=0, le=1)]",
        "test_one_fault_is_one_line",
    ),
    Break(
        "exit_code_of_a_fault",
        "return error.exit_code if error.told else _say(str(error), error.exit_code)",
        "return CRASHED if error.told else _say(str(error), CRASHED)",
        "test_how_a_run_ends",
    ),
)


class Unusable(Exception):
    """A snippet or a test that is not there once, or what no break can be made of."""


class Copy:
    """The tracked files in a folder of their own, where breaks are made, tested and taken back."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree, self.kernels = folder, folder / "tree", folder / "kernels"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        self.files = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
        for name in self.files:
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)

    def place_of(self, snippet: str) -> Path:
        """The file of the package that holds a snippet. Raises: Unusable where it does not stand there once."""
        found = {
            path: path.read_bytes().count(snippet.encode()) for path in self._below(PACKAGE, (".py", ".h", ".cpp"))
        }
        places = [path for path, count in found.items() for _ in range(count)]
        if len(places) != 1:
            raise Unusable(f"{snippet.strip()!r} stands {len(places)} times in {PACKAGE}/")
        return places[0]

    def node_of(self, one: Break) -> str:
        """A break's test as pytest names it. Raises: Unusable where it is not defined in one file."""
        names = [name for name in (one.test, one.beside) if name]
        defined = [re.compile(rf"^ *(async )?def {name}\(", re.MULTILINE) for name in names]
        paths = self._below(TESTS, (".py",))
        texts = {path: path.read_text(encoding="utf-8") for path in paths}
        found = [path for path, text in texts.items() if all(each.search(text) for each in defined)]
        if len(found) != 1:
            raise Unusable(f"{' beside '.join(names)} is defined in {len(found)} files of {TESTS}/")
        return f"{found[0].relative_to(self.tree)}::{one.test}"

    def run(self, breaks: Sequence[Break]) -> tuple[int, str]:
        """The tests of some breaks in the copy as it is: pytest's exit code, and its last line."""
        scratch = Path(tempfile.mkdtemp(dir=self.folder))
        cache = scratch / "cache"  # a new one: rows and tokenizers are not taken from before the break
        if self.kernels.is_dir():  # kept by their content
            shutil.copytree(self.kernels, cache / "kernels")
        nodes = list(dict.fromkeys(self.node_of(one) for one in breaks))
        cases = [one.case for one in breaks if one.case]
        chosen = ["-k", cases[0]] if len(breaks) == 1 and cases else []
        environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",  # a break may keep time and size of its file
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "GEMMA_FT_CACHE": str(cache),
        }
        command = [*PYTEST, f"--basetemp={scratch / 'pytest'}", *chosen, *nodes]
        try:
            ended = subprocess.run(
                command, cwd=self.tree, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
            if not self.kernels.is_dir() and (cache / "kernels").is_dir():
                shutil.copytree(cache / "kernels", self.kernels)
        except subprocess.TimeoutExpired:
            return -1, f"no end after {SECONDS} seconds"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        lines = (ended.stdout.strip() or ended.stderr.strip()).splitlines()
        return ended.returncode, lines[-1] if lines else ""

    def broken(self, one: Break) -> tuple[Path, str, str]:
        """The file that a break is made in, what it says, and what it then says. Raises: Unusable."""
        place = self.place_of(one.snippet)
        whole = place.read_text(encoding="utf-8")
        broken = whole.replace(one.snippet, one.instead)
        try:
            if place.suffix == ".py":
                ast.parse(broken)
        except SyntaxError as error:
            raise Unusable(f"is no Python any more: {error}") from error
        return place, whole, broken

    def seen(self, one: Break) -> str:
        """What the tests of a break do: "red" where they fail. Raises: Unusable."""
        place, whole, broken = self.broken(one)
        place.write_text(broken, encoding="utf-8")
        try:
            code, line = self.run([one])
        finally:
            place.write_text(whole, encoding="utf-8")
        if code == 1 and "failed" in line:
            return "red"
        return "GREEN" if code == 0 else f"did not run: {NO_TESTS_RAN.get(code, '')} {line}"

    def _below(self, top: str, endings: tuple[str, ...]) -> list[Path]:
        mine = Path(__file__).name  # it names every test
        chosen = (name for name in self.files if name.startswith(f"{top}/") and name.endswith(endings))
        return [self.tree / name for name in chosen if Path(name).name != mine]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the breaks one after the other; 0 when all of them are seen red."""
    parser = argparse.ArgumentParser(prog="python -m tests.seeded_breaks", description="See every seeded break red.")
    parser.add_argument("--only", action="append", choices=[one.name for one in BREAKS], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="name the breaks and end")
    options = parser.parse_args(arguments)
    chosen = [one for one in BREAKS if not options.only or one.name in options.only]
    if options.list:
        for one in chosen:
            print(f"{one.name:<26} {one.test}")
        return 0
    with tempfile.TemporaryDirectory(prefix="seeded-breaks-") as folder:
        return _see(Copy(Path(folder)), chosen)


def _see(copy: Copy, breaks: Sequence[Break]) -> int:
    unusable: list[tuple[str, str]] = []
    usable: list[Break] = []
    for one in breaks:
        try:
            copy.broken(one)
            copy.node_of(one)
            usable.append(one)
        except Unusable as error:
            unusable.append((one.name, str(error)))
    began = time.monotonic()
    code, line = copy.run(usable) if usable else (0, "nothing to run")
    print(f"{'(unbroken)':<26} {line.strip('= ')}", flush=True)
    if code != 0:
        print("the tests must pass before anything is broken")
        return 1
    red = 0
    for one in usable:
        started = time.monotonic()
        what = copy.seen(one)
        red += what == "red"
        print(f"{one.name:<26} {what:<5} {time.monotonic() - started:6.1f} s", flush=True)
    for name, why in unusable:
        print(f"{name:<26} UNUSABLE: {why}")
    print(f"{red} of {len(breaks)} seen red in {time.monotonic() - began:.0f} s")
    return 0 if red == len(breaks) else 1


if __name__ == "__main__":
    sys.exit(main())
