"""The command line as a user meets it: its surface, its speed, its exit codes, one plain line for every failure."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer

from gemma_ft.cli.app import build_app, main
from gemma_ft.errors import CheckpointError, DiskError, LockedError, NonFiniteError, UserError

SURFACE = {
    "gemma-ft": ["--version", "--install-completion", "--show-completion", "--help"],
    "gemma-ft train": [
        "RECIPE",
        "KEY=VALUE",
        "--resume",
        "--overwrite",
        "--launch",
        "--nproc",
        "--stop-file",
        "--allow-drift",
        "--prove-resume",
        "--help",
    ],
    "gemma-ft checkpoints": ["RUN", "--verify", "--prune", "--help"],
    "gemma-ft preview": ["RECIPE", "KEY=VALUE", "--rows", "--row-id", "--html", "--help"],
    "gemma-ft plan": ["RECIPE_OR_PRESET", "KEY=VALUE", "--gpu", "--cpu", "--launch", "--nproc", "--help"],
    "gemma-ft data": ["--help"],
    "gemma-ft data check": ["RECIPE", "KEY=VALUE", "--out", "--strict", "--help"],
    "gemma-ft data fix": ["RECIPE", "--out", "KEY=VALUE", "--help"],
    "gemma-ft schema": ["--help"],
    "gemma-ft eval": [
        "RECIPE_OR_RUN",
        "KEY=VALUE",
        "--adapter",
        "--merged",
        "--models",
        "--rows",
        "--batch-size",
        "--metrics",
        "--window",
        "--stride",
        "--tasks",
        "--task-path",
        "--task-limit",
        "--task-chat",
        "--out",
        "--help",
    ],
    "gemma-ft export": [
        "RUN",
        "--to",
        "--out",
        "--gguf-type",
        "--dtype",
        "--graft",
        "--base-id",
        "--push",
        "--public",
        "--dry-run",
        "--help",
    ],
    "gemma-ft import": ["FILE.gguf", "--out", "--dtype", "--config", "--help"],
    "gemma-ft merge": ["RUN", "--out", "--dtype", "--base", "--adapter", "--graft", "--prompts", "--help"],
    "gemma-ft generate": [
        "MODEL",
        "--prompt",
        "--input",
        "--output",
        "--system",
        "--raw",
        "--max-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--seed",
        "--stop",
        "--batch-size",
        "--format",
        "--column",
        "--overwrite",
        "--adapter",
        "--dtype",
        "--quantize",
        "--help",
    ],
    "gemma-ft score": [
        "MODEL",
        "--input",
        "--output",
        "--batch-size",
        "--format",
        "--column",
        "--overwrite",
        "--adapter",
        "--dtype",
        "--quantize",
        "--help",
    ],
    "gemma-ft chat": [
        "MODEL",
        "--compare",
        "--system",
        "--max-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--seed",
        "--stop",
        "--adapter",
        "--dtype",
        "--quantize",
        "--help",
    ],
    "gemma-ft serve": [
        "MODEL",
        "--host",
        "--port",
        "--api-key-env",
        "--max-batch",
        "--max-queue",
        "--max-tokens",
        "--adapter",
        "--dtype",
        "--quantize",
        "--help",
    ],
    "gemma-ft report": ["RUN...", "--out", "--help"],
    "gemma-ft recipes": ["--help"],
    "gemma-ft recipes list": ["--help"],
    "gemma-ft recipes show": ["NAME", "--resolved", "--help"],
    "gemma-ft recipes cp": ["NAME", "DEST", "--help"],
}
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "yaml", "rich")
Train = Callable[[Exception | int], None]


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's."""


@pytest.fixture
def train_ends_with(monkeypatch: pytest.MonkeyPatch) -> Train:
    """Puts a training room in place that raises or returns what is given, so that no run is needed."""

    def end_with(outcome: BaseException | int) -> None:
        def train_and_show(loaded: object, **options: object) -> int:
            if isinstance(outcome, int):
                return outcome
            raise outcome

        room = ModuleType("gemma_ft.ui.training")
        room.train_and_show = train_and_show  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gemma_ft.ui.training", room)

    return end_with


def test_the_surface_is_frozen() -> None:
    """A verb or option that is added, renamed or lost has to be added, renamed or lost here."""
    found = {}

    def walk(command: object, name: str) -> None:
        context = typer.Context(command)
        found[name] = [parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[-1]
                       for parameter in command.get_params(context)]  # fmt: skip
        for verb, child in getattr(command, "commands", {}).items():
            walk(child, f"{name} {verb}")

    walk(typer.main.get_command(build_app()), "gemma-ft")
    assert found == SURFACE


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["chat", "--help"],
        ["recipes"],
        ["--version"],
        ["plan"],
        ["plan", "gemma-2-9b", "--gpu", "24"],
        ["plan", "data/gemma-tiny"],
        ["plan", "sft_tiny", "--cpu", "8"],
        ["plan", "sft_2b", "--launch", "ddp"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = HEAVY[:8] if arguments[0] in ("recipes", "plan") and "--help" not in arguments else HEAVY
    script = (
        "import sys; from gemma_ft.cli.app import main; code = main(sys.argv[1:]); "
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stderr.strip()) == (0, "[]")


def test_the_version_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    import gemma_ft

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gemma-ft {gemma_ft.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "gemma-ft: No such command 'trian'; did you mean 'train'?"),
        (["train"], "gemma-ft train: Missing argument 'RECIPE'; gemma-ft train --help shows what it takes"),
        (["train", "x", "--fast"], "gemma-ft train: No such option: --fast; gemma-ft train --help shows what it takes"),
        (["train", "sft_tiny", "--resume", "--overwrite"],
         "--resume and --overwrite: one continues the run, the other replaces it; give one"),
        (["train", "sft_tiny", "train.epoch=1"], "command line: train.epoch: unknown key; did you mean 'epochs'?"),
        (["preview", "sft_tiny", "train.epoch=1"], "command line: train.epoch: unknown key; did you mean 'epochs'?"),
    ],
)  # fmt: skip
def test_misuse_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (0, 0, ""),
        (143, 143, ""),
        (UserError("a: b"), 2, "a: b\n"),
        (CheckpointError("c"), 3, "c\n"),
        (DiskError("d"), 4, "d\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 4,
         "runs/x: no space left; free some and run again\n"),
        (NonFiniteError("n"), 5, "n\n"),
        (LockedError("l"), 6, "l\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2,
         "out of GPU memory; gemma-ft plan RECIPE --gpu SIZE names the settings that fit\n"),
        (KeyError("x"), 1,
         "a fault of gemma-ft, not of yours: KeyError: 'x' (GEMMA_FT_DEBUG=1 shows the traceback)\n"),
        (RuntimeError("first\nsecond"), 1,
         "a fault of gemma-ft, not of yours: RuntimeError: first (GEMMA_FT_DEBUG=1 shows the traceback)\n"),
    ],
)  # fmt: skip
def test_how_a_run_ends(
    outcome: BaseException | int, code: int, line: str, train_ends_with: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train_ends_with(outcome)
    assert main(["train", "sft_tiny"]) == code
    assert capsys.readouterr().err == line


def test_the_traceback_is_shown_when_asked_for(
    train_ends_with: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ends_with(KeyError("x"))
    monkeypatch.setenv("GEMMA_FT_DEBUG", "1")
    assert main(["train", "sft_tiny"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert error.count("a fault of gemma-ft") == 1


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = f"{sys.executable} -m gemma_ft schema | head -c 10"
    run = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert run.stderr == ""


def test_both_ways_of_starting_it_are_the_same() -> None:
    module = subprocess.run([sys.executable, "-m", "gemma_ft", "recipes", "list"], capture_output=True, text=True)
    script = Path(sys.executable).with_name("gemma-ft")
    if not script.exists():
        pytest.skip("the package is not installed here: no console script")
    assert subprocess.run([script, "recipes", "list"], capture_output=True, text=True).stdout == module.stdout != ""
