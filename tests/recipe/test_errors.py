"""What a recipe's faults are called: every message whole, all of them at once."""

import pytest

from gemma_ft.recipe.load import load_recipe
from gemma_ft.system.shipped import shipped_recipes
from tests.recipe.conftest import GOOD, Write, refusal

LINEAR = "expected one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
TARGETS = "expected all-linear or a list such as [q_proj, v_proj]"
REQUIRED = ("output_dir", "strategy", "data", "model")


def test_every_fault_is_told_at_once_with_file_line_and_key(write: Write) -> None:
    path = write(
        """\
output_dir: runs/x
strategy: qlora
data: {train: a.jsonl, max_seq_len: 5, system: no}
model:
  preset: gemma-2-2c
learning_rate: 3
train:
  learning_rate: fast
  global_batch_size: 32
  micro_batch_size: 5
  precision: float16
  epochs: "3"
  micro_batchsize: 4
quantize: int9
logging: {run_name: 2024}
checkpoint: {keep: 2, keep: 3}
""",
        "recipes/my.yaml",
    )
    assert refusal(path, "trian.epochs=2", "train.max_steps=0", "foo") == [
        "recipes/my.yaml:2: strategy: qlora needs an adapter block; add one, or set strategy: full",
        "recipes/my.yaml:3: data.max_seq_len: must be 16 or more, got 5",
        "recipes/my.yaml:3: data.system: expected one of fold, error, drop, got 'no'",
        "recipes/my.yaml:5: model.preset: expected one of gemma-2b, gemma-7b, gemma-2-2b, gemma-2-9b, gemma-2-27b, "
        "gemma-tiny, gemma-3-270m, gemma-3-1b, gemma-3-4b, "
        "gemma-3-12b, gemma-3-27b, vaultgemma-1b, got 'gemma-2-2c'; did you mean 'gemma-2-2b'?",
        "recipes/my.yaml:6: learning_rate: unknown key; did you mean 'train.learning_rate'?",
        "recipes/my.yaml:8: train.learning_rate: expected a number, got 'fast'",
        "recipes/my.yaml:9: train.global_batch_size: 32 is not a multiple of micro_batch_size 5; use micro_batch_size "
        "4 or 8, or global_batch_size 30 or 35",
        "recipes/my.yaml:11: train.precision: 'float16' overflows in Gemma, whose activations pass 65504; use bf16 or "
        "float32",
        "recipes/my.yaml:12: train.epochs: expected a number, got '3'",
        "recipes/my.yaml:13: train.micro_batchsize: unknown key; did you mean 'micro_batch_size'?",
        "recipes/my.yaml:14: quantize.kind: expected one of nf4, int8, got 'int9'; did you mean 'int8'?",
        "recipes/my.yaml:15: logging.run_name: expected text, got 2024",
        "recipes/my.yaml:16: checkpoint.keep: set twice, first on line 16; keep one",
        "command line: trian: unknown key; did you mean 'train'?",
        "command line: expected key=value or ~key, got 'foo'",
        "command line: train.max_steps: must be 1 or more, got 0",
    ]


def test_a_dtype_by_its_other_name_is_told_ours(write: Write) -> None:
    assert refusal(write(GOOD, "recipes/my.yaml"), "train.precision=bfloat16") == [
        "command line: train.precision: expected one of bf16, float32, got 'bfloat16'; did you mean 'bf16'?"
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("adapter.targets=[q_proj, vproj]", f"adapter.targets.1: {LINEAR}, got 'vproj'; did you mean 'v_proj'?"),
        ("adapter.targets=[7]", f"adapter.targets.0: {LINEAR}, got 7"),
        ("adapter.targets=q_proj", f"adapter.targets: {TARGETS}, got 'q_proj'"),
        ("adapter.targets=[]", f"adapter.targets: {TARGETS}, got []"),
        ("adapter.dora=yes", "adapter.dora: expected true or false, got 'yes'"),
        ("adapter.rank=8.5", "adapter.rank: expected a whole number, got 8.5"),
        ("adapter.rank=true", "adapter.rank: expected a whole number, got true"),
        ("adapter.rank=[", "adapter.rank: not valid YAML: expected the node content, but found '<stream end>'"),
        ("adapter.alpha=.inf", "adapter.alpha: expected a finite number, got inf"),
        ("adapter.dropout=1", "adapter.dropout: must be less than 1, got 1"),
        ("adapter=3", "adapter: expected a block of keys, got 3"),
        ("adapter.init=pissa", "adapter.init: expected one of default, gaussian, got 'pissa'"),
        ("train.learning_rate=0", "train.learning_rate: must be more than 0, got 0"),
        ("train.learning_rate=", "train.learning_rate: expected a number, got nothing"),
        ("train.weight_decay=2", "train.weight_decay: must be 1 or less, got 2"),
        ("train={micro_batch_size: 64}", "train.global_batch_size: 32 is not a multiple of micro_batch_size 64; use "
         "micro_batch_size 32, or global_batch_size 64"),
        ("train.seed=1", "train.seed: unknown key; did you mean 'seed' at the top level?"),
        ("seed.x=1", "seed.x: unknown key; seed has none"),
        ("seed=-1", "seed: must be 0 or more, got -1"),
        ("~sed", "sed: unknown key; did you mean 'seed'?"),
        ("~train.x.y", "train.x: unknown key; known here: epochs, max_steps, optimizer, learning_rate, "
         "global_batch_size, micro_batch_size, schedule, warmup_ratio, weight_decay, max_grad_norm, precision, "
         "gradient_checkpointing"),
        ("~output_dir", None),
        ("~seed=3", "expected key=value or ~key, got '~seed=3'"),
        ("=3", "expected key=value or ~key, got '=3'"),
        ("train..x=3", "expected key=value or ~key, got 'train..x=3'"),
        ("extends=sft_2b", "extends: only a recipe file can name its parent"),
        ("data.columns.propmt={x}", "data.columns.propmt: expected one of prompt, completion, system, messages, text, "
         "chosen, rejected, weight, label, margin, got 'propmt'; did you mean 'prompt'?"),
        ("data.train=", "data.train: expected a path, a block of keys, or a list of them, got nothing"),
        ('data.train=""', "data.train.0.path: must not be empty"),
        ("logging.run_name=a/b", "logging.run_name: expected 1 to 64 letters, digits, '.', '_' or '-', got 'a/b'"),
        ("model.revision=hf_abcdefghijklmnopqrstuvwxyz", "model.revision: looks like an access token; keep it out of "
         "recipes and commands: log in, or set it in the environment"),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(write: Write, override: str, line: str | None) -> None:
    expected = f"command line: {line}" if line else "my.yaml:1: output_dir: missing; every recipe needs it"
    assert refusal(write(), override) == [expected]


INT8 = ("strategy=qlora", "quantize=int8", "adapter.dora=true")


@pytest.mark.parametrize(
    "overrides", [INT8, (*INT8, "adapter.rslora=true"), (*INT8, "train.precision=float32", "adapter.targets=[q_proj]")]
)
def test_magnitudes_over_int8_are_refused(write: Write, overrides: tuple[str, ...]) -> None:
    """peft 0.21.2 reads each weight for DoRA; bitsandbytes 0.50.2 then takes the layer for one that it has set up."""
    where = "magnitudes cannot be computed over int8 weights; set quantize: nf4, or dora: false"
    assert refusal(write(), *overrides) == [f"command line: adapter.dora: {where}"]


@pytest.mark.parametrize("instead", ["strategy=lora", "quantize=nf4", "adapter.dora=false", "adapter={rank: 4}"])
def test_what_is_near_to_it_is_no_fault(write: Write, instead: str) -> None:
    recipe = load_recipe(write(), [*INT8[:2], *(() if "adapter=" in instead else INT8[2:]), instead]).recipe
    assert recipe.adapter is not None


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [f"my.yaml:1: {key}: missing; every recipe needs it" for key in REQUIRED]),
        ("- a\n", ["my.yaml:1: expected key: value lines, got a list"]),
        ("just words\n", ["my.yaml:1: expected key: value lines, got 'just words'"]),
        (GOOD + "train:\n", ["my.yaml:6: train: expected a block of keys, got nothing"]),
        (GOOD + "1: 2\n", ["my.yaml:6: a key must be a word, got 1"]),
        (GOOD + "[a]: 2\n", ["my.yaml:6: a key must be a word, got a list"]),
        (GOOD + "seed: 1\nseed: 2\n", ["my.yaml:7: seed: set twice, first on line 6; keep one"]),
        (GOOD + "seed: !!python/name:os.system\n",
         ["my.yaml:6: seed: tag 'tag:yaml.org,2002:python/name:os.system' is not allowed"]),
        (GOOD + "eval:\n\tmax_rows: 3\n",
         ["my.yaml:7: not valid YAML: found character '\\t' that cannot start any token"]),
        (GOOD + "train: {epochs: 1\n", ["my.yaml:7: not valid YAML: expected ',' or '}', but got '<stream end>'"]),
        (GOOD + "---\na: 1\n", ["my.yaml:6: not valid YAML: expected a single document in the stream but found another "
         "document"]),
        (GOOD + "# \x00\n", ["my.yaml:6: not valid YAML: character U+0000 is not allowed"]),
        (GOOD + 'x: "\\UFFFFFFFF"\n', ["my.yaml:1: not valid YAML: an escape or a number is out of range"]),
        (GOOD + "seed: " + "9" * 5000 + "\n", ["my.yaml:6: seed: a number of more than 400 digits"]),
        (GOOD + "x: " + "[" * 100_000, ["my.yaml:6: nested deeper than 20 levels; a recipe needs three"]),
        (GOOD + "x: &a [*a]\n", ["my.yaml:6: more than 2000 values, or an alias that holds itself"]),
        (GOOD + "x: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{y}: &{y} [*{x},*{x},*{x},*{x},*{x},*{x},*{x},*{x},*{x},*{x}]\n" for x, y in ("ab", "bc", "cd")),
         ["my.yaml:6: more than 2000 values, or an alias that holds itself"]),
        (GOOD + "x: [&a 1" + ", *a" * 101 + "]\n", ["my.yaml:6: more than 100 aliases; write the values out"]),
        (GOOD + "x: &a 1\ny: &a 2\n", ["my.yaml:7: not valid YAML: found duplicate anchor 'a'; first occurrence second "
         "occurrence"]),
        (GOOD.encode() + b"# \xff\n", ["my.yaml:6: not UTF-8 text; is this a recipe?"]),
        (GOOD + "#" * 300_000, ["my.yaml: larger than 256 KiB; is this a recipe?"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_as_a_recipe(write: Write, text: str | bytes, lines: list[str]) -> None:
    assert refusal(write(text)) == lines


def test_a_secret_is_not_repeated(write: Write) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    for override in (f"strategy={secret}", f"train.epochs={secret}", f"data.train=https://{secret}@hf.co/x"):
        assert secret not in "\n".join(refusal(write(), override))


def test_a_recipe_that_is_not_there(write: Write) -> None:
    write()
    shipped = ": " + ", ".join(path.stem for path in shipped_recipes())
    assert "sft_2b, sft_7b, sft_gemma2_27b" in shipped
    assert refusal("recipes/sft_tny.yaml") == [
        f"recipes/sft_tny.yaml: no such recipe; did you mean 'sft_tiny'? shipped{shipped}"
    ]
    assert refusal("zzz") == [f"zzz: no such recipe; shipped{shipped}"]
    assert refusal("") == [f": no such recipe; shipped{shipped}"]
    assert refusal("a" * 5000) == [f"{'a' * 5000}: no such recipe; shipped{shipped}"]
    assert refusal(".") == [".: is a folder; name a recipe file in it"]
