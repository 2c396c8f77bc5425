"""The gate before every route: who may ask, from where, and in what form; and the count of what was answered."""

from __future__ import annotations

import hmac
import time
import traceback

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_ft.serve.address import Binding, host_of, is_loopback
from gemma_ft.serve.errors import ApiFault, fault_of_ours
from gemma_ft.serve.metrics import Metrics
from gemma_ft.system import environment
from gemma_ft.system.observer import Observer

OPEN_ROUTE = "/health"  # for whoever watches the process; it tells nothing but whether it lives
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", OPEN_ROUTE, "/metrics")
JSON = "application/json"


class Gate:
    """Wraps an application: refuses before a body is read, and lets no exception and no trace out.

    On loopback the Host header must name this machine, and bodies must say that they are JSON: otherwise a page in the
    user's browser could drive the server (DNS rebinding, forms across sites).

    Starlette's TrustedHostMiddleware cannot do the first: it knows names and `*.name`, not every address of 127.0.0.0/8
    and every spelling of ::1, and answers 400 in plain text where clients read a JSON error with 403.
    """

    def __init__(self, app: ASGIApp, binding: Binding, metrics: Metrics, observer: Observer) -> None:
        self.app, self.binding, self.metrics, self.observer = app, binding, metrics, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, counted)
        except ApiFault as fault:
            await send_fault(counted, fault)
        except Exception as error:
            _report(self.observer, scope, error)
            if status == 0:
                await send_fault(counted, fault_of_ours())
            else:  # what has begun cannot become an error: the connection is cut
                raise
        finally:
            route = route_of(scope["path"])
            self.metrics.requests.labels(route, str(status or 499)).inc()  # 499: the client had left
            self.metrics.duration.labels(route).observe(time.monotonic() - begun)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        # A page whose name was moved to this address would be let in by the browser; it cannot know a key.
        open_to_pages = self.binding.key is None and self.binding.loopback
        if open_to_pages and not is_loopback(host_of(headers.get("host", ""))):
            raise ApiFault(403, "this server answers to localhost only; the Host header names another")
        if scope["path"] != OPEN_ROUTE and not self._key_fits(headers):
            raise ApiFault(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise ApiFault(415, f"Content-Type must be {JSON}")

    def _key_fits(self, headers: Headers) -> bool:
        """Compared in a time that does not depend on how much of the key is right."""
        if self.binding.key is None:
            return True
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        same = hmac.compare_digest(key.strip().encode("latin-1"), self.binding.key.encode())
        return same and scheme.lower() == "bearer"


def route_of(path: str) -> str:
    """The label of a path: as many as there are routes, whatever clients ask for."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in ROUTES else "other"


async def send_fault(send: Send, fault: ApiFault) -> None:
    """Answer with a fault."""
    headers = {"content-type": JSON, "content-length": str(len(fault.content)), **fault.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": raw})
    await send({"type": "http.response.body", "body": fault.content})


def _report(observer: Observer, scope: Scope, error: Exception) -> None:
    """One line: the kind of the exception and where, never its text, which may quote a prompt."""
    if environment.debug_enabled():
        observer.warn("".join(traceback.format_exception(error)).rstrip("\n"))
    kind, route = type(error).__name__, route_of(scope["path"])
    observer.warn(f"a fault of gemma-ft: {kind} at {route} (GEMMA_FT_DEBUG=1 shows the traceback)")
