"""The routes of the server: OpenAI's chat, completions and models, and what watches it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gemma_ft.errors import UserError
from gemma_ft.infer.session import Session
from gemma_ft.serve.address import Binding
from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.metrics import CONTENT_TYPE
from gemma_ft.serve.middleware import Gate
from gemma_ft.serve.responses import Answer, EventStream
from gemma_ft.serve.room import answer_room
from gemma_ft.serve.scheduler import Call, Job, Scheduler
from gemma_ft.serve.schema import ChatRequest, CompletionRequest, parsed
from gemma_ft.system.observer import SILENT, Observer

SERVED_FROM = 0  # `created` of the model: no date is known of it
CLIENT_LEFT = 499  # nobody sees it: for the metrics
# FastAPI's own telemetry would follow environment variables; nothing is sent anywhere
NO_TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)


class Service:
    """What the routes do, over one session."""

    def __init__(self, session: Session, scheduler: Scheduler, limits: Limits) -> None:
        self.session, self.scheduler, self.limits = session, scheduler, limits
        self.model = served_id(session)
        self._names = {self.model, self.model.rpartition("/")[2], session.name}

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = parsed(ChatRequest, await read_body(request, self.limits.body_bytes), self.limits)
        self._check_model(body.model)
        turns = body.turns(self.session.encoder.chat)
        if turns[0].role == "system" and self.session.encoder.system_policy == "error":
            text = "messages.0: this model was trained without system messages and takes none"
            raise ApiFault(400, text, param="messages.0")
        self.scheduler.check_room(body.n)
        ids = await self._ids(lambda: self.session.chat_ids(turns), "messages")
        return await self._answer(request, body, [ids], "chat")

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = parsed(CompletionRequest, await read_body(request, self.limits.body_bytes), self.limits)
        self._check_model(body.model)
        self.scheduler.check_room(body.n * len(body.prompts))
        prompts = [
            await self._ids(lambda text=text: self.session.completion_ids(text), body.prompt_at(place))
            for place, text in enumerate(body.prompts)
        ]
        return await self._answer(request, body, prompts, "text")

    async def models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, model: str) -> Response:
        """GET /v1/models/{model}."""
        self._check_model(model)
        return JSONResponse(self._card())

    async def health(self) -> Response:
        """GET /health."""
        status = self.scheduler.health
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def metrics(self) -> Response:
        """GET /metrics."""
        return Response(self.scheduler.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _answer(
        self, request: Request, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], kind: Any
    ) -> Response:
        rooms = [self._room(len(ids), body, body.prompt_at(place)) for place, ids in enumerate(prompts)]
        jobs = [
            Job(place * body.n + choice, ids, room, body.sampling(choice), body.stop)
            for place, (ids, room) in enumerate(zip(prompts, rooms, strict=True))
            for choice in range(body.n)
        ]
        answer = Answer(kind, self.model, sum(map(len, prompts)), body.include_usage)
        call = self.scheduler.submit(jobs, answer.prompt_tokens)
        if body.stream:
            return EventStream(answer.events(call), lambda: self.scheduler.cancel(call))
        try:
            return await self._unless_gone(request, answer, call)
        finally:
            self.scheduler.cancel(call)

    async def _unless_gone(self, request: Request, answer: Answer, call: Call) -> Response:
        """The whole answer, given up as soon as the client has left."""
        answered = asyncio.create_task(answer.whole(call))
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((answered, gone), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await answered) if answered.done() else Response(status_code=CLIENT_LEFT)
        finally:
            for task in (answered, gone):
                task.cancel()

    async def _ids(self, encode: Any, param: str) -> list[int]:
        """Token ids, made on another thread: a long text must not hold up everybody's answers."""
        try:
            ids: list[int] = await asyncio.to_thread(encode)
        except UserError as error:
            raise ApiFault(400, f"{param}: {str(error).removeprefix('prompt: ')}", param=param) from None
        return ids

    def _room(self, prompt_tokens: int, body: ChatRequest | CompletionRequest, prompt_at: str) -> int:
        asked_at, asked = body.answer_tokens
        context = self.session.engine.max_seq_len
        return answer_room(
            prompt_tokens, asked, context=context, limits=self.limits, prompt_at=prompt_at, asked_at=asked_at
        )

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            raise ApiFault(
                404, f"no such model here; this server serves {self.model!r}", param="model", code="model_not_found"
            )

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": SERVED_FROM, "owned_by": "gemma-ft"}


def build_app(
    session: Session, scheduler: Scheduler, limits: Limits, binding: Binding, observer: Observer = SILENT
) -> FastAPI:
    """The ASGI application; the scheduler's thread lives as long as it does. No page of its own, no CORS header.
    `observer` is told of faults of ours.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    service = Service(session, scheduler, limits)
    app = FastAPI(title="gemma-ft", openapi_url=None, redirect_slashes=False, lifespan=lifespan, telemetry=NO_TELEMETRY)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", service.completion, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", service.models, response_model=None)
    app.add_api_route("/v1/models/{model:path}", service.one_model, response_model=None)
    app.add_api_route("/health", service.health, response_model=None)
    app.add_api_route("/metrics", service.metrics, response_model=None)
    app.add_exception_handler(HTTPException, _routing_fault)
    app.add_middleware(Gate, binding=binding, metrics=scheduler.metrics, observer=observer)
    return app


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request, chunked or not, never more than `limit` bytes of it. Raises: ApiFault."""
    too_long = ApiFault(413, f"the body is longer than {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_long
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_long
    except ClientDisconnect:
        raise ApiFault(CLIENT_LEFT, "the client left") from None
    return bytes(body)


def served_id(session: Session) -> str:
    """The id under which a model is served: a hub id as it is, of a path its last part."""
    path = Path(session.name)
    if session.name == session.place.base.name and not path.is_absolute():
        return session.name
    return path.resolve().name or "model"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _routing_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    fault = ApiFault(error.status_code, f"{request.method} {request.url.path}: {str(error.detail).lower()}")
    return JSONResponse(fault.body, status_code=fault.status, headers=error.headers)
