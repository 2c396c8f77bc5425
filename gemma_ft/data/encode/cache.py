"""Encoded rows on disk, found again by what they say: a chunk of a source is encoded once for each tokenizer, template
and format, and read by every rank, run and verb from then on.

A file is an Arrow stream and its CRC-32 behind it. It appears complete, whoever else writes the same one, and one that
is damaged is made anew. The whole folder may be removed at any time.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow as pa

from gemma_ft.data.conversation import Item, Pair
from gemma_ft.data.encode.documents import Documents, Part, without_empty
from gemma_ft.data.encode.encode_rows import Reading, encoded_chunk
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.chunks import Chunk
from gemma_ft.errors import DiskError
from gemma_ft.system import environment
from gemma_ft.system.files import write_cached
from gemma_ft.system.row_kind import DOCUMENTS_OF

CHECKSUM_BYTES = 4
SMALL_BYTES = 2**18  # read rather than mapped: a process may have some ten thousand maps
ALONE = 1  # chunks that are encoded here before other processes, which start slowly, are asked to help


def encode_chunk(reading: Reading, chunk: Chunk, path: Path) -> None:
    """Encode a chunk and write it to `path`. Raises: DiskError when it cannot be written."""
    _write(encoded_chunk(reading, chunk), path)


class Cache:
    """A folder of encoded chunks."""

    def __init__(self, root: Path, workers: int) -> None:
        self.root, self.workers = root, workers

    def documents(
        self,
        chunks: Iterable[Chunk],
        reading: Reading,
        bad: BadRows,
        *,
        limit: int = sys.maxsize,
        progress: Callable[[int], None] = lambda documents: None,
    ) -> Documents:
        """The rows of some chunks, encoded now or before, until `limit` documents are there (all of the last chunk are
        given); bad rows are left out and added to `bad`. `progress` hears of each chunk how many documents it gave.

        Raises: DiskError when the cache cannot be written.
        """
        parts, count = [], 0
        with contextlib.closing(self._encoded(chunks, reading)) as encoded:
            for chunk, table in encoded:
                part = Part(table, chunk.bare().where)
                last = part.offset(limit - count - 1) if len(table) >= limit - count else sys.maxsize
                for where, reason in part.bad_until(last):
                    bad.add(where, reason)
                parts.append(part)
                count += len(table)
                progress(len(table))
                if count >= limit:
                    break
        return Documents(parts)

    def _encoded(self, chunks: Iterable[Chunk], reading: Reading) -> Generator[tuple[Chunk, pa.Table]]:
        """Each chunk with its table, in order."""
        line: deque[tuple[Chunk, Path, Future[pa.Table | None]]] = deque()
        pool: ProcessPoolExecutor | None = None
        done = 0
        try:
            for chunk in chunks:
                key = reading.key(chunk)
                path = self.root / key[:2] / f"{key}.arrow"
                future: Future[pa.Table | None] = Future()
                table = _read(path)
                if table is not None:
                    future.set_result(table)
                elif self.workers < 2 or done < ALONE:
                    encode_chunk(reading, chunk, path)
                    future.set_result(None)
                    done += 1
                else:
                    if pool is None:
                        spawn = multiprocessing.get_context("spawn")
                        pool = ProcessPoolExecutor(self.workers, spawn, _start, (reading,))
                    with contextlib.suppress(BrokenProcessPool):  # found out when its result is asked for
                        future.set_exception(BrokenProcessPool())
                        future = pool.submit(_encode_here, chunk, path)
                line.append((chunk, path, future))
                while line and (line[0][2].done() or len(line) > 2 * self.workers):
                    yield self._settled(line.popleft(), reading)
            while line:
                yield self._settled(line.popleft(), reading)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _settled(
        self, waiting: tuple[Chunk, Path, Future[pa.Table | None]], reading: Reading
    ) -> tuple[Chunk, pa.Table]:
        chunk, path, future = waiting
        try:
            table = future.result()
        except (BrokenProcessPool, RecursionError) as error:
            # workers killed for memory, or a script without a main guard: slower, not lost. Or rows that cannot be sent
            self.workers = 1 if isinstance(error, BrokenProcessPool) else self.workers
            table = None
            encode_chunk(reading, chunk, path)
        table = _read(path) if table is None else table
        if table is None:
            raise DiskError(f"{path}: cannot be read back after it was written; is the disk damaged?")
        return chunk, table


def items_at(
    chunks: Iterable[Chunk], reading: Reading, documents: Documents, wanted: Iterable[int]
) -> list[Item | Pair]:
    """The items that some documents were made from, in their order, a pair once; `chunks`: those of the documents, read
    again.
    """
    each = DOCUMENTS_OF[documents.rows]
    rows: dict[int, list[int]] = {}
    for part, row in map(documents.place, wanted):
        rows.setdefault(part, []).append(row)
    found: list[Item | Pair] = []
    part = 0
    for chunk in chunks:
        if part > max(rows, default=-1):
            break
        read = [item for _, item in reading.items(chunk, BadRows())]
        kept = list(range(len(read))) if each == 2 else without_empty(read)
        if not kept:  # such a chunk is no part
            continue
        found += [read[kept[row]] for row in dict.fromkeys(row // each for row in rows.get(part, ()))]
        part += 1
    return found


_reading: Reading | None = (
    None  # of a worker process, set once at its start: it is too large to be sent with each chunk
)


def _start(reading: Reading) -> None:
    """In a worker: signals are for the process that it works for, and it ends with that."""
    global _reading
    _reading = reading
    environment.one_thread_for_tokens()
    gc.disable()  # millions of lists and no cycle among them
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode_here(chunk: Chunk, path: Path) -> None:
    assert _reading is not None, "a worker begins with _start"
    encode_chunk(_reading, chunk, path)


def _write(table: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue()
    try:
        write_cached(path, data, zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little"))
    except OSError as error:
        raise DiskError(
            f"{path.parent}: encoded rows cannot be kept there: {error.strerror}; "
            "set GEMMA_FT_CACHE to a folder with room"
        ) from error


def _read(path: Path) -> pa.Table | None:
    """The table in a file, mapped into memory and not read; None when there is none, or none that is whole."""
    try:
        if not os.path.isfile(path):  # Path's own raises where a folder above may not be entered
            return None
        if os.path.getsize(path) < SMALL_BYTES:
            data = pa.py_buffer(path.read_bytes())
        else:
            with pa.memory_map(str(path)) as mapped:
                data = mapped.read_buffer()
        body = data.slice(0, max(0, data.size - CHECKSUM_BYTES))
        whole = zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little") == data.slice(body.size).to_pybytes()
        return pa.ipc.open_stream(body).read_all() if whole else None
    except (OSError, pa.ArrowException):
        return None
