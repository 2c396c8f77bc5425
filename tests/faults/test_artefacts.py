"""Files made to run code, escape their folder or follow a link: opened by every door, and nothing of theirs happens."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_ft.cli.app import main
from tests.faults.conftest import Runs
from tests.forked import fork

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class", "os.fork")
TINY = Path(__file__).resolve().parents[2] / "data" / "gemma-tiny"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path, how: str) -> None:
        self.mark, self.how = mark, how

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.how == "system":
            return os.system, (f"touch {self.mark}",)
        return Path.touch, (self.mark,)


def pickles(mark: Path) -> Iterator[bytes]:
    """Plain pickles in every protocol, and the zip form that torch writes."""
    for how, protocol in itertools.product(("system", "touch"), range(pickle.HIGHEST_PROTOCOL + 1)):
        raw = pickle.dumps(Payload(mark, how), protocol=protocol)
        yield raw
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
            archive.writestr("archive/version", "3")
        yield packed.getvalue()


WEIGHT_NAMES = ("pytorch_model.bin", "model.bin", "model.pt", "weights.pth", "consolidated.ckpt", "model.pkl",
                "model.safetensors")  # fmt: skip
ADAPTER_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors")


def with_pickles(root: Path, good: Path, names: Sequence[str], contents: Sequence[bytes]) -> Iterator[Path]:
    """Copies of a good folder whose weights are pickles, under each of some names; its own weights have the last."""
    for number, (name, content) in enumerate(itertools.product(names, contents)):
        folder = root / f"{names[-1]}-{number}"
        shutil.copytree(good, folder)
        (folder / names[-1]).unlink()
        (folder / name).write_bytes(content)
        yield folder


def other_folders(root: Path, mark: Path) -> Iterator[Path]:
    """Code that a config, a tokenizer or a template asks for; shards elsewhere; links."""
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    templates = [
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set x = lipsum.__globals__['os'].popen('touch MARK') %}{{ x }}",
        "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    ]
    for number, template in enumerate(templates):
        folder = root / f"template{number}"
        shutil.copytree(TINY, folder)
        (folder / "chat_template.jinja").write_text(template.replace("MARK", str(mark)))
        yield folder
    for file, key in itertools.product(
        ("config.json", "tokenizer_config.json", "generation_config.json"),
        ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel"),
    ):
        folder = root / f"code-{file}-{key}"
        shutil.copytree(TINY, folder)
        (folder / "modeling_evil.py").write_text(code)
        spec = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(
            json.dumps({**spec, "auto_map": {key: "modeling_evil.Evil"}, "trust_remote_code": True})
        )
        yield folder
    for number, shard in enumerate(
        ("../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "model.bin", "~/x.safetensors",
         "..\\x.safetensors", "file:///etc/passwd")
    ):  # fmt: skip
        folder = root / f"shard{number}"
        shutil.copytree(TINY, folder)
        (folder / "model.safetensors").unlink()
        (root / "outside.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        yield folder


def recipes(root: Path, mark: Path) -> Iterator[Path]:
    """YAML that makes objects, and YAML that grows without end."""
    payloads = [
        f"!!python/object/apply:os.system ['touch {mark}']",
        f"!!python/object/new:os.system ['touch {mark}']",
        f"!!python/object/apply:subprocess.Popen [['touch', '{mark}']]",
        "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1, 2]",
        f"!!python/object/apply:pathlib.Path.touch ['{mark}']",
        "!<tag:yaml.org,2002:python/object/apply:os.getcwd> []",
    ]  # fmt: skip
    shapes = ["output_dir: {}", "data: {{train: {}}}", "{}", "extends: {}", "? {}\n: 1", "train: {{learning_rate: {}}}"]
    for number, (shape, payload) in enumerate(itertools.product(shapes, payloads)):
        path = root / f"recipe{number}.yaml"
        path.write_text(shape.format(payload) + "\n")
        yield path
    laughs = [f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)]
    bombs = ["a: &a [1, 1]\n" + "".join(laughs), "[" * 10_000, "{a: " * 5_000, "a: " + "x" * 3_000_000]
    for number, bomb in enumerate(bombs):
        path = root / f"bomb{number}.yaml"
        path.write_text(bomb)
        yield path


def watched(mark: Path, happened: list[str]) -> None:
    """Note every event by which code could be run, and any opening of what lies outside."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN) or (event == "open" and "passwd" in str(arguments[0])):
            happened.append(f"{event} {arguments}")

    sys.addaudithook(hook)


def test_nothing_that_lies_in_a_file_is_run(runs: Runs, tmp_path: Path, figure: Callable[..., None]) -> None:
    out = runs.place()
    codes, said = runs.go(out)
    assert codes == [0], said
    mark = tmp_path / "pwned"

    def open_all() -> int:
        from gemma_ft.kernels import cpp_backend

        happened: list[str] = []
        tried: dict[str, int] = {}
        kinds = list(pickles(mark))
        doors = [
            (
                "model",
                with_pickles(tmp_path, TINY, WEIGHT_NAMES, kinds[::2]),
                ["generate", "{}", "--prompt", "x", "--max-tokens", "1"],
            ),
            ("folder", other_folders(tmp_path, mark), ["generate", "{}", "--prompt", "x", "--max-tokens", "1"]),
            (
                "adapter",
                with_pickles(tmp_path, out / "adapter", ADAPTER_NAMES, kinds),
                ["generate", "{}", "--prompt", "x"],
            ),
            ("recipe", recipes(tmp_path, mark), ["train", "{}", f"output_dir={tmp_path / 'never'}"]),
        ]
        places = [(kind, path, words) for kind, found, words in doors for path in found]
        cpp_backend.operations()  # which asks the compiler for its version, once in a process
        watched(mark, happened)
        for kind, path, words in places:
            code = main([word.replace("{}", str(path)) for word in words])
            allowed = (0, 2) if kind == "folder" else (2,)
            if code not in allowed:
                happened.append(f"exit code {code} for {path}")
            tried[kind] = tried.get(kind, 0) + 1
        (tmp_path / "tried.json").write_text(json.dumps({"tried": tried, "happened": happened}))
        return 0

    child = fork(open_all, tmp_path / "said.txt")
    assert child.wait(600) == 0, child.said
    found = json.loads((tmp_path / "tried.json").read_text())
    assert found["happened"] == []
    assert "Traceback" not in child.said
    assert not mark.exists()
    assert not (tmp_path / "never").exists()
    total = sum(found["tried"].values())
    assert total >= 200
    figure(**found["tried"], total=total, executions=0)


def test_a_link_is_not_followed_on_write(runs: Runs, tmp_path: Path) -> None:
    """The lock, and an output folder: what a link points to stays as it was."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = runs.place()
    out.mkdir()
    (out / ".lock").symlink_to(victim)
    codes, said = runs.go(out)
    assert codes == [2], said
    assert victim.read_text() == "mine"
