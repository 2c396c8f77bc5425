"""Weights & Biases and TensorBoard take the figures when asked, and never stop a run."""

from __future__ import annotations

import math
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.run_dir import RunDir
from gemma_ft.train.run_log import RunLog
from gemma_ft.train.trackers import GuardedTracker, _start_wandb, _TensorBoard, _wandb_id

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]


class Writer:
    """A tracker that notes what it gets; `fault` is raised by each call, `gate` is waited for."""

    def __init__(self, fault: Exception | None = None, gate: threading.Event | None = None) -> None:
        self.got: list[Any] = []
        self.entered = threading.Event()
        self._fault, self._gate = fault, gate

    def _take(self, *given: Any) -> None:
        self.entered.set()
        if self._gate is not None:
            self._gate.wait()
        self.got.append(given)
        if self._fault is not None:
            raise self._fault

    def log(self, step: int, figures: dict[str, Any]) -> None:
        self._take(step, figures)

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        self._take(step, *lines)

    def close(self) -> None:
        self._take("close")


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a writer waits for; open at the end, whatever happens."""
    event = threading.Event()
    yield event
    event.set()


def events_in(folder: Path) -> list[Event]:
    """All events of a folder, file by file: each is its length, a checksum, itself, a checksum (TFRecord)."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while len(data) >= 12:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars_in(folder: Path) -> list[tuple[int, str, float]]:
    return [(one.step, value.tag, value.simple_value) for one in events_in(folder) for value in one.summary.value]


def test_a_tracker_gets_everything_in_order() -> None:
    writer, said = Writer(), list[str]()
    tracker = GuardedTracker("T", lambda: writer, said.append)
    tracker.log(1, {"loss": 2.0})
    tracker.samples(1, [{"prompt": "p"}])
    tracker.close(30)
    assert writer.got == [(1, {"loss": 2.0}), (1, {"prompt": "p"}), ("close",)]
    assert said == []


def test_a_tracker_that_blocks_is_left_behind(gate: threading.Event) -> None:
    writer, said = Writer(gate=gate), list[str]()
    tracker = GuardedTracker("T", lambda: writer, said.append, room=2)
    tracker.log(0, {})
    assert writer.entered.wait(30)
    for step in range(1, 6):
        tracker.log(step, {})
    tracker.close(0.001)
    assert said == [
        "T is behind and misses figures; metrics.jsonl has them all",
        "T did not finish in 0.001 s; metrics.jsonl has everything",
    ]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (NotImplementedError("Got <class 'NoneType'>"), "NotImplementedError: Got <class 'NoneType'>"),
    ],
)
def test_a_tracker_that_raises_is_told_once(fault: Exception, line: str) -> None:
    writer, said = Writer(fault), list[str]()
    tracker = GuardedTracker("T", lambda: writer, said.append)
    for step in range(5):
        tracker.samples(step, [])
    tracker.close(30)
    tracker.close(30)
    assert len(writer.got) == 1
    assert said == [f"T takes no more figures ({line}); metrics.jsonl has them all"]


def test_a_tracker_that_cannot_start_is_left_out(gate: threading.Event) -> None:
    def missing() -> Writer:
        raise ImportError("No module named 'tensorboardX'")

    def waiting() -> Writer:
        gate.wait()
        return Writer()

    said: list[str] = []
    for start in (missing, waiting):
        tracker = GuardedTracker("T", start, said.append)
        tracker.log(1, {"loss": 1.0})
        tracker.close(30 if start is missing else 0.001)
    assert said == [
        "T: No module named 'tensorboardX'; going on without it",
        "T did not finish in 0.001 s; metrics.jsonl has everything",
    ]


def test_a_figure_that_was_not_finite_is_nan(tmp_path: Path) -> None:
    """tensorboardX 2.6: add_scalar(None) raises NotImplementedError. TensorBoard and W&B show NaN."""
    said, writer = list[str](), Writer()
    trackers = [
        GuardedTracker("T", lambda: writer, said.append),
        GuardedTracker("TensorBoard", partial(_TensorBoard, tmp_path / "tensorboard"), said.append),
    ]
    log = RunLog(RunDir(tmp_path), True, said.append, list(trackers))
    log.step({"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.5, "skipped": True})
    log.scores(1, {"eval_loss": 2.0, "exact_match": None})  # None: not measured
    log.close()
    assert said == []
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null, "grad_norm": null, "learning_rate": 0.5, "skipped": true}\n'
    )
    ((_, first), (_, second), _) = writer.got
    assert [name for name, value in first.items() if math.isnan(value)] == ["loss", "grad_norm"]
    assert second == {"eval_loss": 2.0}
    found = {tag: value for _, tag, value in scalars_in(tmp_path / "tensorboard")}
    assert math.isnan(found.pop("loss"))
    assert math.isnan(found.pop("grad_norm"))
    assert found == {"learning_rate": 0.5, "skipped": 1.0, "eval_loss": 2.0}


def test_an_event_file_that_cannot_grow_ends_tensorboard_alone(tmp_path: Path) -> None:
    """Of tensorboardX 2.6's own writer, add_scalar and close wait for ever behind its dead thread."""
    said: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        tracker = GuardedTracker("TensorBoard", partial(_TensorBoard, tmp_path / "t"), said.append)
        for step in range(100):
            tracker.log(step, {"loss": 1.0})
        tracker.close(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said == [
        "TensorBoard takes no more figures (OSError: [Errno 27] File too large); metrics.jsonl has them all"
    ]
    assert scalars_in(tmp_path / "t")[:2] == [(0, "loss", 1.0), (1, "loss", 1.0)]


def test_a_resumed_run_takes_back_what_tensorboard_has_of_its_lost_steps(tmp_path: Path) -> None:
    """TensorBoard 2 drops events of earlier files from the step of a START on (event_accumulator, _Purge)."""
    for done, steps in ((0, range(1, 6)), (3, range(4, 7)), (0, range(1, 2))):
        tracker = GuardedTracker("TensorBoard", partial(_TensorBoard, tmp_path, done), pytest.fail)
        for step in steps:
            tracker.log(step, {"loss": float(step)})
        tracker.close(30)
    assert len(list(tmp_path.iterdir())) == 3
    starts = [one.step for one in events_in(tmp_path) if one.session_log.status == SessionLog.START]
    assert starts == [4, 0]  # of a resume after step 3, and of one without a checkpoint, which begins anew


def test_a_resumed_run_goes_on_with_its_id_in_wandb(recipe_for: RecipeFor, tmp_path: Path) -> None:
    recipe = recipe_for("logging.wandb=offline").recipe
    tmp_path.joinpath("run").mkdir()
    ids = []
    for done in (0, 3, 0):
        tracker = _start_wandb(recipe, tmp_path / "run", pytest.fail, done)
        tracker.log(done + 1, {"loss": math.nan})
        ids.append(tracker.run.id)
        tracker.close()
    assert ids[0] == ids[1] != ids[2]


def test_the_id_is_that_of_the_newest_run_of_wandb(tmp_path: Path) -> None:
    assert _wandb_id(tmp_path / "none") is None
    for name in ("run-20260101_090000-aaaa", "offline-run-20260102_080000-b-b_b", "run-20251231_235959-zz", "run-x"):
        (tmp_path / name).mkdir()
    assert _wandb_id(tmp_path) == "b-b_b"


def test_wandb_offline_writes_its_own_files(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    sampled = ["eval.every_steps=2", "eval.samples=1", "eval.max_new_tokens=2"]
    loaded = recipe_for("strategy=lora", "logging.wandb=offline", *sampled)
    assert len(train(loaded)) == 4
    assert "W&B" not in (tmp_path / "console.txt").read_text()  # nothing it was given was refused
    assert list((Path(loaded.recipe.output_dir) / "wandb").glob("offline-run-*/files/media/table/samples*.json"))
    assert list((Path(loaded.recipe.output_dir) / "wandb").glob("offline-run-*/*.wandb"))


def test_a_dead_wandb_never_stops_a_run(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as probe:  # a port on which nobody listens
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("gemma_ft.train.trackers.CONNECT_SECONDS", 2)
    assert len(train(recipe_for("strategy=lora", "logging.wandb=online"))) == 4
    assert "going on offline" in (tmp_path / "console.txt").read_text()


def test_tensorboard_writes_event_files(recipe_for: RecipeFor, train: Train) -> None:
    sampled = ["eval.every_steps=2", "eval.samples=1", "eval.max_new_tokens=2"]
    loaded = recipe_for("strategy=lora", "logging.tensorboard=true", *sampled)
    assert len(train(loaded)) == 4
    events = list((Path(loaded.recipe.output_dir) / "tensorboard").iterdir())
    assert len(events) == 1
    assert events[0].read_bytes().count(b"sample 1/text_summary") == 3
