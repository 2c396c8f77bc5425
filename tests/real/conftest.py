"""Published files, and random models of their vocabulary. A file that was not fetched skips its tests with that reason;
with GEMMA_FT_REAL=required a skip fails the run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real import fetch
from tests.real.fetch import REAL_270M, gemma3_270m_folder, packages

REQUIRED = os.environ.get("GEMMA_FT_REAL") == "required"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.real)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What ran, and a failure where something that had to run was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    ran, skipped = (len(reporter.stats.get(kind, ())) for kind in ("passed", "skipped"))
    reporter.write_line(f"real files: {ran} tests passed, {skipped} skipped")
    if REQUIRED and (skipped or not ran):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def fetched(name: str) -> Path:
    """The folder of one package of the manifest."""
    package = packages()[name]
    if not package.folder.is_dir():
        pytest.skip(f"{package.package} {package.version} was not fetched: python -m tests.real.fetch")
    return package.folder


@pytest.fixture(scope="session")
def gemma1_tokenizer() -> Path:
    """Gemma 1's tokenizer.json as it was first converted."""
    return fetched("gemma1")


@pytest.fixture(scope="session")
def gemma2_tokenizer() -> Path:
    return fetched("gemma2")


@pytest.fixture(scope="session")
def gemma3_tokenizer() -> Path:
    return fetched("gemma3")


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """What a child process puts on its path to import xllamacpp."""
    return fetched("xllamacpp")


@pytest.fixture(scope="session")
def gemma3_270m_gguf() -> Path:
    """Google's own pretrained Gemma 3 270M as it was fetched: a GGUF file in Q4_K_M."""
    fetched(REAL_270M)
    return fetch.gemma3_270m_gguf()


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """The same as a transformers folder in float32, as `gemma-ft import` makes it; no test writes into it."""
    fetched(REAL_270M)
    if not gemma3_270m_folder().is_dir():
        pytest.skip("the real Gemma 3 270M was not imported: make real")
    return gemma3_270m_folder()


def random_gemma(folder: Path, tokenizer: Path, family: str) -> Path:
    """A small model folder with the real vocabulary and loud random weights, as transformers saves it."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GemmaConfig,
        GemmaForCausalLM,
    )

    sizes: dict[str, Any] = {"vocab_size": 256_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
             "max_position_embeddings": 2048}  # fmt: skip
    torch.manual_seed(0)
    if family == "gemma3":  # the vocabulary of 270M and 1B: the tokenizer has a token more
        sizes |= {"vocab_size": 262_144, "num_hidden_layers": 6}  # the last of them sees all keys
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, query_pre_attn_scalar=32, sliding_window=64))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, query_pre_attn_scalar=32, sliding_window=64))
    else:
        model = GemmaForCausalLM(GemmaConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.08)
    model.to(torch.bfloat16).save_pretrained(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.fixture(scope="session")
def gemma1(gemma1_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 1 folder of the real vocabulary."""
    return random_gemma(tmp_path_factory.mktemp("gemma1"), gemma1_tokenizer, "gemma")


@pytest.fixture(scope="session")
def gemma2(gemma2_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 folder of the real vocabulary."""
    return random_gemma(tmp_path_factory.mktemp("gemma2"), gemma2_tokenizer, "gemma2")


@pytest.fixture(scope="session")
def gemma3(gemma3_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 folder of the real vocabulary, as 270M has it."""
    return random_gemma(tmp_path_factory.mktemp("gemma3"), gemma3_tokenizer, "gemma3")
