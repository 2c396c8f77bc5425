"""Where a server listens, and whether it may: decided before anything heavy is loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass, field

from gemma_ft.errors import UserError
from gemma_ft.system import environment

LOOPBACK_NAME = "localhost"
PORT_FAULTS = {
    errno.EADDRINUSE: "in use; stop what listens there, or choose another with --port",
    errno.EACCES: "needs privileges; choose one above 1023 with --port",
}


@dataclass(frozen=True)
class Binding:
    """Address, port (0: any that is free) and API key of a server. The key is in no representation of it."""

    host: str
    port: int
    key: str | None = field(default=None, repr=False)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, is this machine and nobody else's. Names are not looked up."""
    if host.lower() == LOOPBACK_NAME:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_binding(host: str, port: int, key_variable: str | None) -> Binding:
    """The binding that a command line asks for; `key_variable` names the environment variable that holds the API key.

    Raises: UserError when anyone but this machine could reach a server without a key, or the key cannot be one. No
    message repeats what was given for the key or for its name, which may be the key by mistake.
    """
    key = environment.from_environment(key_variable) if key_variable is not None else None
    if key_variable is not None and not key:
        raise UserError("--api-key-env: the variable it names is not set, or empty; export it first")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("--api-key-env: an API key is made of printable ASCII characters without blanks")
    binding = Binding(host, port, key)
    if not binding.loopback and key is None:
        raise UserError(
            f"--host {host}: others could reach it, so it needs an API key; put one into an environment variable "
            "and name that with --api-key-env, or bind to 127.0.0.1"
        )
    return binding


def open_socket(binding: Binding) -> socket.socket:
    """A bound socket that does not listen yet: a port in use is known before a model is loaded.

    Raises: UserError when host or port cannot be had.
    """
    try:
        found = socket.getaddrinfo(binding.host or None, binding.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {binding.host}: no such address") from None
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # IPv4 where both are
    if binding.loopback and not is_loopback(str(address[0])):
        raise UserError(f"--host {binding.host}: is not this machine's loopback here; give 127.0.0.1")
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise _fault(binding, error) from None
    return opened


def listen(opened: socket.socket, binding: Binding, backlog: int) -> None:
    """Begin to take connections. Raises: UserError when another process took the port in the meantime."""
    try:
        opened.listen(backlog)
    except OSError as error:
        raise _fault(binding, error) from None


def url_of(opened: socket.socket) -> str:
    """http://host:port of a bound socket, with the port it really has."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def host_of(header: str) -> str:
    """The host in a Host header, without port and brackets."""
    text = header.strip()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def _fault(binding: Binding, error: OSError) -> UserError:
    if error.errno in PORT_FAULTS:
        return UserError(f"--port {binding.port}: {PORT_FAULTS[error.errno]}")
    return UserError(f"--host {binding.host}: cannot be bound: {error.strerror or error}")
