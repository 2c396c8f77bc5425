"""`gemma-ft serve`: a model behind OpenAI's API, for programs on this machine unless told otherwise."""

import importlib.util
from typing import Annotated

import typer

from gemma_ft.cli.model_options import Adapter, Dtype, Model, Quantize, memory_advice, open_model
from gemma_ft.cli.start import check_model
from gemma_ft.errors import UserError

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Model,
    host: Annotated[str, typer.Option("--host", metavar="H", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="P", min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env",
            metavar="NAME",
            help="Environment variable with the key that clients must send; needed beyond this machine.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", metavar="N", min=1, help="Answers at once.")] = 8,
    max_queue: Annotated[int, typer.Option("--max-queue", metavar="N", min=0, help="Answers that may wait.")] = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer.")] = 2048,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = "auto",
) -> int:
    """Serve a model over HTTP in the form of OpenAI's API."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError("serve: needs FastAPI, uvicorn and prometheus_client; pip install 'gemma-ft[serve]'")
    from gemma_ft.serve.address import checked_binding, open_socket
    from gemma_ft.serve.limits import Limits

    check_model(model, adapter, answers=True)
    binding = checked_binding(host, port, api_key_env)
    opened = open_socket(binding)
    limits = Limits(max_batch=max_batch, max_queue=max_queue, max_tokens=max_tokens)
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries(answering=True)
    with memory_advice("serve with a smaller --max-batch, or with --quantize nf4"):
        session = open_model(model, adapter, dtype, quantize, max_batch=limits.max_batch)
        from gemma_ft.serve.run import run_server
        from gemma_ft.ui.stderr import StderrObserver

        return run_server(session, opened, binding, limits, key_variable=api_key_env, observer=StderrObserver())
