"""What stands around a run: another process in its directory, a tracker that does not answer, secrets."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import ROOT, Runs, outcome
from tests.forked import free_port, no_survivors

SECRETS = {
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary12",
    "WANDB_API_KEY": "c0ffee" * 6 + "cafe",
    "OPENAI_API_KEY": "sk-canaryCANARYcanaryCANARY123456",
}


def test_two_processes_in_one_directory(runs: Runs, reference: tuple[Any, bytes]) -> None:
    """One trains; the other is told, and touches nothing."""
    out = runs.place()
    first = runs.start(out, "train.max_steps=400")
    with no_survivors(first):
        while not (out / "checkpoints" / "step-00000001").is_dir():
            assert not first[0].ended(), first[0].said
            time.sleep(0.01)
        codes, said = runs.go(out, "train.max_steps=400", "--resume")
        assert codes == [6], said
        told = said.splitlines()[-1]
        assert told.startswith(f"{out}: process {first[0].pid} on ")
        assert told.endswith(" is writing to it; wait for it to end, or choose another output_dir")
        assert not first[0].ended()
    codes, said = runs.go(out, "--overwrite")
    assert codes == [0], said
    assert outcome(out) == reference


def test_a_dead_tracker_delays_nothing_for_long(runs: Runs, reference: tuple[Any, bytes]) -> None:
    out = runs.place()
    dead = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": "x" * 40, "WANDB_MODE": "online"}
    begun = time.monotonic()
    codes, said = runs.go(out, "logging.wandb=online", environment=dead)
    assert codes == [0], said
    assert time.monotonic() - begun < 60
    assert outcome(out) == reference


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_at(port: int, cache: Path) -> Callable[[], None]:
    """The hub, asked at a port of this machine, and its cache, in a process that is not in offline mode."""

    def install() -> None:
        from huggingface_hub import constants

        from gemma_ft.system import hub

        constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = False, str(cache)
        constants.ENDPOINT = f"http://127.0.0.1:{port}"
        hub.CONNECT_SECONDS = 0.5
        hub.ask_or_go_offline.cache_clear()

    return install


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "silent"])
def test_a_dead_hub_delays_nothing_for_long(
    runs: Runs, reference: tuple[Any, bytes], tmp_path: Path, silent: bool
) -> None:
    """What is in the cache is used, and what is not is told; whether the hub refuses, or takes the call and says
    nothing.
    """
    cached = tmp_path / "models--some--gemma"
    shutil.copytree(ROOT / "data" / "gemma-tiny", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        if silent:
            one.listen(50)
        dead = hub_at(one.getsockname()[1], tmp_path)
        out = runs.place()
        codes, said = runs.go(out, "model.weights=some/gemma", before=dead)
        assert codes == [0], said
        assert outcome(out) == reference
        for key, name in (("model.weights", "other/gemma"), ("data.train", "some/rows")):
            codes, said = runs.go(runs.place(), f"{key}={name}", before=dead)
            assert codes == [2], said
            assert said.splitlines()[-1] == (
                f"{name}: not in the local cache and the hub cannot be reached; connect once, or name a local path"
            )


def test_no_secret_of_the_environment_is_written(runs: Runs) -> None:
    out = runs.place()
    codes, said = runs.go(out, "logging.wandb=offline", "logging.tensorboard=true", environment=SECRETS)
    assert codes == [0], said
    hits = [
        f"{path}: {name}"
        for path in out.rglob("*")
        if path.is_file()
        for name, value in SECRETS.items()
        if value.encode() in path.read_bytes()
    ]
    assert hits == []
    assert not any(value in said for value in SECRETS.values())
