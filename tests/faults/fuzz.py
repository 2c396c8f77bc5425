"""Good bytes and good values made bad, the same way for the same seed: what the fuzz tests feed to every reader."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 20.0  # what one case may take: the slowest reads a model

# What breaks readers: ends of ranges, other kinds, other encodings, Gemma's own control tokens, text that grows.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), "",
    " ", "\n", "None", "null", "nan", "true", "1", "<start_of_turn>", "<bos><eos><pad>", "\x00", "\ud83d", "\udc00",
    "\ufeff", "\u2028", "\x1b[2J", "é" * 300, "{question}", "{0.__class__}", "{{ 7 * 7 }}", "../../etc/passwd",
    "/dev/null", "~", [], {}, [None], [[]], [{}], {"": ""}, {"role": "user"}, {"content": None}, [1, ["a"]],
    {"from": "human", "value": 3}, {"role": ["user"], "content": {"text": "x"}}, "x" * 5000,
)  # fmt: skip
BYTES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\r\n", b'"', b"'", b"{", b"}", b"[", b"]", b",",
    b":", b"\\", b"\\ud800", b"\\u0000", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"NaN", b"-Infinity", b"1e999",
    b"#", b"- ", b"? ", b"&a", b"*a", b"!!python/name:os.system", b"<<: *a", b"%", b"\t", b"\x1b[31m", b"[" * 2000,
    b"9" * 5000, b'{"a":' * 1200, b"<end_of_turn>",
)  # fmt: skip


def bad_bytes(good: bytes, chance: random.Random) -> bytes:
    """`good` with one to three faults: flipped, cut out, cut off, doubled, or something put in between."""
    data = bytearray(good)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + int(chance.expovariate(0.1)))
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at:end] * chance.choice((1, 2, 50))
        elif kind == 4:
            data[at:end] = chance.randbytes(chance.randint(1, 8))
        else:
            data[at:at] = chance.choice(BYTES)
    return bytes(data)


def bad_value(good: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one to three faults: a value of another kind, a key gone, renamed or added."""
    value = copy.deepcopy(good)
    for _ in range(chance.randint(1, 3)):
        value = _spoiled(value, chance)
    return value


def _spoiled(value: Any, chance: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return copy.deepcopy(chance.choice(VALUES))
    parent, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[chance.choice((f"{key}s", str(key).upper(), f" {key}", "", "\u0440ole"))] = parent.pop(key)
    elif kind == 2:
        parent[key] = [parent[key]] if chance.random() < 0.5 else {"value": parent[key]}
    elif kind == 3 and isinstance(parent, list):
        parent[key:key] = [copy.deepcopy(parent[key])] * chance.choice((1, 2, 600))
    elif kind == 3:
        added = chance.choice(("extra", "messages", "text", "system", "train", "type"))
        parent[added] = copy.deepcopy(chance.choice(VALUES))
    else:
        parent[key] = copy.deepcopy(chance.choice(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield value, key
        yield from _places(one)


def bad_json(good: Any, chance: random.Random) -> bytes:
    """A JSON value as bytes: spoiled as a value, or as bytes, or both."""
    value = bad_value(good, chance) if chance.random() < 0.7 else good
    text = json.dumps(value, ensure_ascii=chance.random() < 0.8)
    data = text.encode("utf-8", "surrogatepass")
    return bad_bytes(data, chance) if value is good or chance.random() < 0.2 else data


class Hung(BaseException):
    """A case took too long."""


def tried(case: Callable[[], Any], allowed: tuple[type[Exception], ...]) -> str:
    """ "taken", "refused" (by an error that is allowed), or what went wrong."""

    def alarm(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        case()
    except allowed as error:
        return (
            "refused" if str(error).strip() and "Traceback" not in str(error) else f"an error without words: {error!r}"
        )
    except Hung:
        return f"a hang: not done in {SECONDS:.0f} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    else:
        return "taken"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
