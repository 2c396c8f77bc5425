"""`gemma-ft serve` as a user starts it; what the server does is tested in tests/serve."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_ft.cli.app import main

MODEL = Path(__file__).resolve().parents[2] / "data" / "gemma-tiny"
KEY = "canary-3f1c"
SCRIPT = (
    "import sys; from gemma_ft.cli.app import main; code = main(sys.argv[1:]); "
    "print([name for name in ('torch', 'transformers', 'numpy', 'fastapi', 'uvicorn') if name in sys.modules]); "
    "sys.exit(code)"
)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--host", "0.0.0.0"],
         "--host 0.0.0.0: others could reach it, so it needs an API key; put one into an environment variable and "
         "name that with --api-key-env, or bind to 127.0.0.1\n"),
        (["--api-key-env", KEY], "--api-key-env: the variable it names is not set, or empty; export it first\n"),
    ],
)  # fmt: skip
def test_an_open_door_is_refused_before_anything_is_loaded(options: list[str], line: str) -> None:
    """Whether there is such a model is not even looked at; a key given in place of its name is not repeated."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, "serve", "nowhere", *options], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (2, "[]\n", line)


def test_a_port_in_use_is_known_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 2
    line = f"--port {port}: in use; stop what listens there, or choose another with --port\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert main(["serve", str(MODEL)]) == 2
    assert capsys.readouterr() == (
        "",
        "serve: needs FastAPI, uvicorn and prometheus_client; pip install 'gemma-ft[serve]'\n",
    )


def test_no_such_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "./nowhere", "--port", "0"]) == 2
    line = "./nowhere: no such folder; name a folder with a model, or a hub id (owner/name)\n"
    assert capsys.readouterr() == ("", line)


def test_it_serves_with_a_key_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """The key is in nothing that the process says, or is started with."""
    command = [sys.executable, "-m", "gemma_ft", "serve", str(MODEL), "--port", "0", "--api-key-env", "SERVER_KEY"]
    process = subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "SERVER_KEY": KEY},
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    while "stop     Ctrl-C" not in said:  # bounded: the process ends by itself if it fails
        line = process.stderr.readline()
        assert line, said
        said += line
    url = next(line for line in said.splitlines() if line.startswith("gemma-ft serves gemma-tiny at http://127.0.0.1:"))
    connection = http.client.HTTPConnection(url.split("//")[1].removesuffix("/v1"), timeout=30)
    for headers, status in (({}, 401), ({"Authorization": f"Bearer {KEY}"}, 200)):
        connection.request("GET", "/v1/models", headers=headers)
        reply = connection.getresponse()
        assert (reply.status, KEY in reply.read().decode()) == (status, False)
    process.send_signal(signal.SIGTERM)  # with a connection open that says nothing
    out, err = process.communicate(timeout=60)
    connection.close()
    assert (process.returncode, out, err) == (143, "", "")
    assert KEY not in said
