"""Faults as OpenAI's API words them: a status and {"error": {message, type, param, code}}, never a path or a trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiFault(Exception):
    """A request that is not answered: its HTTP status, and one line for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def content(self) -> bytes:
        """The body as JSON."""
        return json.dumps(self.body).encode()


def fault_of_ours() -> ApiFault:
    """What a client is told when something went wrong that it cannot repair."""
    return ApiFault(500, "internal error", code="internal_error")


def engine_stopped(status: int) -> ApiFault:
    """What everybody is told once the engine has failed: this server ends and must be started again."""
    return ApiFault(status, "the engine has stopped; the server is going down", code="engine_stopped")
