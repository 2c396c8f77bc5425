"""What one server takes on, at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may ask for, send and hold open. The command line sets the first three."""

    max_batch: int = 8  # answers generated at once
    max_queue: int = 64  # answers that may wait for a place; more are refused with 429
    max_tokens: int = 2048  # of one answer, and what a request that names none gets as far as the context has room
    choices: int = 8  # `n`: answers to one prompt
    stop_strings: int = 4
    stop_characters: int = 256  # of one stop string
    body_bytes: int = 1 << 20
    request_seconds: float = 600.0  # from the accepted request to its last token
    read_seconds: float = 30.0  # from a request's first byte to its last
    write_seconds: float = 30.0  # a client may leave its answer unread
    keep_alive_seconds: int = 5
    shutdown_seconds: int = 5  # that running answers get when the server is told to stop
    connections: int = 256
    drained_bytes: int = 8 << 20  # of a refused request's body that are read away before its connection is cut

    @property
    def capacity(self) -> int:
        """Answers that may be open at once, running or waiting."""
        return self.max_batch + self.max_queue
