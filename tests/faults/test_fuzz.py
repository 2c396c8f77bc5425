"""Thousands of rows, recipes, artefacts and requests that were spoiled at random: each is taken or refused in words, in
time; no traceback, no hang.
"""

from __future__ import annotations

import http.client
import json
import random
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.build.contract import Contract
from gemma_ft.build.pretrained import load_model, load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.recipe.load import dump_recipe, load_recipe
from gemma_ft.serve.limits import Limits
from gemma_ft.train import checkpoints
from gemma_ft.ui.pages.page import write_report
from tests.faults.conftest import FULL, ROOT, Runs
from tests.faults.fuzz import SECONDS, bad_bytes, bad_json, bad_value, tried
from tests.forked import fork
from tests.serve.conftest import MODEL, SteppedEngine, chat_body, serving

CASES = 10_000 if FULL else 300
TINY = ROOT / "data" / MODEL
PATIENCE = 3000.0
Case = Callable[[random.Random], tuple[Callable[[], Any], bytes]]  # what is tried, and the bytes to look at if it fails
Figure = Callable[..., None]


def fuzz(make: Callable[[], Case], seed: int, tmp_path: Path, figure: Figure, allowed: Any = (UserError,)) -> None:
    """CASES cases in a process of their own; `make` is called there, and what may use tensors or threads belongs in
    it.
    """

    def work() -> int:
        became: Counter[str] = Counter()
        faults: list[str] = []
        case = make()
        for number in range(CASES):
            attempt, given = case(random.Random(f"{seed}:{number}"))
            verdict = tried(attempt, allowed)
            became[verdict if verdict in ("taken", "refused") else "failed"] += 1
            if verdict not in ("taken", "refused"):
                faults.append(f"case {number}: {verdict}; given {given[:400]!r}")
        (tmp_path / "became.json").write_text(json.dumps([became, faults]))
        return 0

    child = fork(work, tmp_path / "said.txt")
    assert child.wait(PATIENCE) == 0, child.said
    counted, faults = json.loads((tmp_path / "became.json").read_text())
    became = Counter(counted)
    assert not faults, "\n".join(faults[:20])
    assert "Traceback" not in child.said, child.said
    assert min(became["taken"], became["refused"]) > CASES / 50, f"one-sided, so little is tried: {became}"
    figure(cases=CASES, taken=became["taken"], refused=became["refused"], tracebacks=0, hangs=0)


OVERRIDDEN = ("train.learning_rate", "data.columns.prompt", "seed", "adapter", "~eval", "model.preset")


# Recipes


def test_spoiled_recipes(tmp_path: Path, figure: Figure) -> None:
    def make() -> Case:
        import yaml

        files = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
        full = load_recipe(ROOT / "recipes/sft_tiny.yaml").recipe.model_dump(mode="json")
        written = tmp_path / "recipe.yaml"

        def case(chance: random.Random) -> tuple[Callable[[], Any], bytes]:
            if chance.random() < 0.5:
                data = bad_bytes(chance.choice(files), chance)
            elif chance.random() < 0.5:
                data = bad_json(full, chance)
            else:
                data = yaml.dump(bad_value(full, chance), allow_unicode=True).encode("utf-8", "surrogatepass")
            written.write_bytes(data)
            key = chance.choice(OVERRIDDEN)
            words = [f"{key}={bad_bytes(b'2e-4', chance).decode('utf-8', 'replace')}"] if chance.random() < 0.3 else []

            def attempt() -> None:
                recipe = load_recipe(written, words).recipe
                (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
                assert load_recipe(tmp_path / "again.yaml").recipe == recipe, "what is written is not what is read"

            return attempt, data + repr(words).encode()

        return case

    fuzz(make, 2, tmp_path, figure)


# Artefacts


def test_spoiled_artefacts(runs: Runs, tmp_path: Path, figure: Figure) -> None:
    """Model, adapter, tokenizer, contract, checkpoint and the papers of a run."""
    run = runs.place()
    codes, said = runs.go(run, "eval.every_steps=3")
    assert codes == [0], said

    def make() -> Case:
        from tests.parity.amplified import ours

        base = tmp_path / "base"
        ours("gemma-2-2b", num_hidden_layers=1).save_pretrained(base)
        doors: dict[str, tuple[Path, Callable[[Path], Any]]] = {
            "model": (base, load_model),
            "adapter": (small_adapter(tmp_path / "adapter", base), load_model),
            "tokenizer": (tokenizer_folder(tmp_path / "words", run / "adapter"), open_tokenizer),
            "checkpoint": (run / "checkpoints", partial(open_checkpoints, before=contents(run / "checkpoints"))),
            "report": (papers(tmp_path / "papers", run), lambda folder: write_report(folder, folder / "report.html")),
        }

        def case(chance: random.Random) -> tuple[Callable[[], Any], bytes]:
            # a report takes a second; everything else some milliseconds
            name = chance.choices(tuple(doors), weights=(30, 30, 19, 20, 1))[0]
            good, door = doors[name]
            folder = tmp_path / "spoiled"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
            path = chance.choice(files)
            data = path.read_bytes()
            whole = json.loads(data) if path.suffix == ".json" else None
            spoiled = bad_json(whole, chance) if whole is not None else bad_bytes(data, chance)
            path.write_bytes(spoiled)
            return partial(door, folder), f"{name} {path.name}: ".encode() + spoiled

        return case

    fuzz(make, 3, tmp_path, figure)


def small_adapter(folder: Path, base: Path) -> Path:
    from gemma_ft.adapters.lora import add_adapter

    model = add_adapter(load_model(base), rank=2, alpha=4.0, targets="all-linear", dropout=0.0, rslora=False,
                        dora=False, init="gaussian", base=str(base), revision=None)  # fmt: skip
    model.save_pretrained(folder)
    return folder


def tokenizer_folder(folder: Path, good: Path) -> Path:
    folder.mkdir()
    for path in good.iterdir():
        if "token" in path.name or path.name in ("gemma_ft.json", "chat_template.jinja"):
            shutil.copy(path, folder)
    return folder


def open_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    contract = Contract.read(folder)
    if contract is not None:
        contract.encoder(tokenizer, folder).content.encode("some text")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def open_checkpoints(root: Path, before: dict[str, bytes]) -> None:
    """Whatever is still taken for valid holds what was saved, byte for byte."""
    valid = checkpoints.newest_valid(root, lambda line: None)
    if valid is None:
        raise UserError("none is valid")
    for path in valid.iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == before[f"{valid.name}/{path.name}"], f"{path.name} is not what was saved"
    if len(list(root.glob("step-*"))) < 2:
        raise UserError("one was set aside")


def papers(folder: Path, run: Path) -> Path:
    """What a report is made of: everything of a run but its weights."""
    ignore = shutil.ignore_patterns("*.safetensors", "checkpoints", "adapter", "report.html", ".lock")
    shutil.copytree(run, folder, ignore=ignore)
    return folder


# Requests


class Instant(SteppedEngine):
    """An engine that never waits."""

    def step(self) -> Any:
        self.let()
        return super().step()


class Refused(Exception):
    """The server said no."""


def test_spoiled_requests(tmp_path: Path, figure: Figure) -> None:
    """Nine of ten are bodies, the tenth is the request itself; the server lives on, and says never 5xx."""

    def make() -> Case:
        from dataclasses import replace

        import torch

        from gemma_ft.infer.session import open_session
        from gemma_ft.system import environment

        environment.quiet_libraries()
        session = open_session(TINY, dtype=torch.float32)
        engine: Any = Instant(session.tokenizer.convert_tokens_to_ids("a"))
        open_server = serving(replace(session, engine=engine), Limits(read_seconds=0.2))
        served = open_server.__enter__()
        make.server = open_server  # type: ignore[attr-defined]  # kept open
        chat = chat_body(max_tokens=3, temperature=0.5, top_p=0.9, seed=1, stop=["x"], n=1, stream=False)
        text = {"model": MODEL, "prompt": ["Once", "Twice"], "max_tokens": 3, "stream": True}

        def case(chance: random.Random) -> tuple[Callable[[], Any], bytes]:
            path, good = chance.choice((("/v1/chat/completions", chat), ("/v1/completions", text)))
            body = bad_json(good, chance)
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            whole = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
            if chance.random() < 0.1:
                whole = bad_bytes(whole, chance)
            return partial(ask, served.address, whole), whole

        return case

    fuzz(make, 4, tmp_path, figure, allowed=(Refused,))


def ask(address: tuple[str, int], request: bytes) -> None:
    """Send bytes, read what comes. Raises: Refused for 4xx, or a connection that was closed upon what is no request."""
    with socket.create_connection(address, timeout=SECONDS) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        try:
            answer.begin()
            content = answer.read()
        except (http.client.BadStatusLine, http.client.IncompleteRead, ConnectionError) as error:
            raise Refused(f"closed: {error!r}") from error
    assert answer.status < 500, f"{answer.status}: {content!r}"
    assert b"Traceback" not in content, content
    assert b"site-packages" not in content, content
    if answer.status >= 400:
        raise Refused(f"{answer.status}: {content!r}")


def test_the_fuzz_finds_faults(tmp_path: Path, figure: Figure) -> None:
    """A reader with a fault in it, one that hangs, and one that refuses without a word."""

    def make() -> Case:
        def case(chance: random.Random) -> tuple[Callable[[], Any], bytes]:
            data = bad_json({"n": 1}, chance)
            return lambda: json.loads(data)["n"] + 1, data

        return case

    with pytest.raises(AssertionError, match="case "):
        fuzz(make, 5, tmp_path, figure)
    silent = tried(lambda: (_ for _ in ()).throw(UserError("")), (UserError,))
    assert silent == "an error without words: UserError('')"
